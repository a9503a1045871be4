"""The second ledger's section 15: settlement and ends, and the windows of commitments (SEG-6)."""

from typing import Any

from tests.chain.second.formats import u32, u64
from tests.chain.second.records import Ledger, Record, held

CLEARED = {"undrawn", "passed", "unaudited", "audited_by_submitter"}
HELD = {"drawn", "committed", "opened"}
OPEN = {*HELD, "waiting", "failed"}


class Settling(Ledger):
    """What is paid, when, and how a job ends."""

    def segment(self, job_id: bytes, slot: int, number: int) -> Record | None:
        return self.db.get(b"g" + job_id + u32(slot) + u64(number))

    def put_segment(self, job_id: bytes, slot: int, number: int, **changes: Any) -> None:
        key = b"g" + job_id + u32(slot) + u64(number)
        self.put(key, self.db[key], **changes)

    # -- 13: windows

    def at_limit(self, job: Record, state: Record) -> bool:
        return bool(
            state["committed"] < job["rounds"]
            and state["committed"] - state["settled"] >= job["unsettled"]
        )

    def stall_clock(self, job_id: bytes, slot: int, window: str = "segment_window") -> None:
        """SEG-6."""
        job, state = self.db[b"j" + job_id], self.slot(job_id, slot)
        done = state["committed"] == job["rounds"] or self.at_limit(job, state)
        if done or state["worker"]["session"] == b"":
            self.cancel("stall", job_id, slot)
        else:
            self.set(self.after(window), "stall", job_id, slot)

    def waits(self, job_id: bytes) -> bool:
        """SEG-7."""
        job = self.db[b"j" + job_id]
        states = {slot: self.slot(job_id, slot) for slot in self.living(job)}
        next_ones = [self.segment(job_id, slot, one["settled"]) for slot, one in states.items()]
        return any(self.at_limit(job, state) for state in states.values()) and all(
            segment is not None and segment["status"] != "committed" for segment in next_ones
        )

    def is_own(self, job: Record, slot: int) -> bool:
        return bool(job["privacy"] == "split" and slot == 0)

    def times(self, job: Record, slot: int) -> int:
        """The weight of the slot's lane."""
        return int(job["lane_weights"][slot // len(job["stages"])])

    # -- 15: settlement

    def next_cleared(self, job_id: bytes, slot: int) -> Record | None:
        state = self.slot(job_id, slot)
        if state["settled"] == state["committed"]:
            return None
        segment = self.segment(job_id, slot, state["settled"])
        return segment if segment is not None and segment["status"] in CLEARED else None

    def ready_at(self, segment: Record) -> int:
        """SETTLE-1."""
        at = int(segment["linked"] + self.rules["settle_window"])
        return max(at, segment["proof_until"]) if segment["proof"] == "waiting" else at

    def round_ready_at(self, job_id: bytes) -> int | None:
        found = [self.next_cleared(job_id, slot) for slot in self.living(self.db[b"j" + job_id])]
        cleared = [segment for segment in found if segment is not None]
        return max(map(self.ready_at, cleared)) if len(cleared) == len(found) else None

    def arm(self, job_id: bytes) -> None:
        """SETTLE-2."""
        at = self.round_ready_at(job_id)
        if at is None:
            self.cancel("settle", job_id)
        else:
            self.set(max(self.height + 1, at), "settle", job_id)

    def settle_rounds(self, job_id: bytes) -> None:
        """SETTLE-4, JOB-9."""
        job = self.db[b"j" + job_id]
        slots = self.living(job)
        limited = any(self.at_limit(job, self.slot(job_id, slot)) for slot in slots)
        while (at := self.round_ready_at(job_id)) is not None and at <= self.height:
            for slot in slots:
                self.pay_segment(job_id, slot)
            self.hold(job, slots)
        if self.slot(job_id, slots[0])["settled"] == job["rounds"]:
            self.put_job(job_id, status="finishing", finished=self.height)
            self.cancel("deadline", job_id)
            self.cancel("standby", job_id)
            self.set(self.after("result_window"), "result", job_id)
            return
        self.arm(job_id)
        if limited:
            for slot in slots:
                self.stall_clock(job_id, slot)

    def pay_segment(self, job_id: bytes, slot: int) -> None:
        """SETTLE-5 to SETTLE-8."""
        job, state = self.db[b"j" + job_id], self.slot(job_id, slot)
        number, worker = state["settled"], state["worker"]
        segment = self.segment(job_id, slot, number)
        assert segment is not None
        proof = "missing" if segment["proof"] == "waiting" else segment["proof"]
        self.put_slot(job_id, slot, settled=number + 1, **self.copies(job, slot, segment, proof))
        self.put_segment(job_id, slot, number, settled=self.height, proof=proof)
        if not self.is_own(job, slot):
            self.pay(job_id, worker["owner"], "worker", worker["price"])
            self.count(worker["owner"], "segments")
        if proof == "equal":
            amount = job["standby_price"] * (number % job["state_every"] + 1)
            self.pay(job_id, segment["holder"], "standby", amount)
            self.count(segment["holder"], "proofs")
        key = b"u" + job_id + u32(slot) + u64(number)
        if key in self.db and self.db[key]["status"] == "passed":
            self.pay_auditor(job_id, key)

    def copies(self, job: Record, slot: int, segment: Record, proof: str) -> Record:
        """SETTLE-10: `held` and `unproven` after the next segment has settled."""
        state, standby = self.slot(job["id"], slot), job["standby"]
        held, unproven = state["held"], state["unproven"]
        if standby is None or standby["session"] == b"" or self.is_own(job, slot):
            held, unproven = state["settled"] + 1, 0
        elif proof in ("unequal", "missing") and (
            segment["standby_hash"] or state["last_commit"] > segment["committed"]
        ):
            unproven += segment["committed"] >= job["standby_since"]
        return {"held": held, "unproven": unproven}

    def hold(self, job: Record, slots: list[int]) -> None:
        """SETTLE-10: one cut for all slots."""
        standby = job["standby"]
        if standby is None or standby["session"] == b"":
            return
        slots = [slot for slot in slots if not self.is_own(job, slot)]
        settled = self.slot(job["id"], slots[0])["settled"]
        for slot in slots:
            segment = self.segment(job["id"], slot, settled - 1)
            assert segment is not None
            if (segment["proof"], segment["holder"]) != ("equal", standby["owner"]):
                return
        for slot in slots:
            self.put_slot(job["id"], slot, held=settled, unproven=0)

    def pay_auditor(self, job_id: bytes, key: bytes) -> None:
        """SETTLE-8."""
        job, audit = self.db[b"j" + job_id], self.db[key]
        price = job["audit_price"] * self.times(job, int.from_bytes(key[33:37], "big"))
        self.put_job(job_id, audits_reserved=job["audits_reserved"] - price)
        self.put(key, audit, paid=price)
        self.pay(job_id, audit["owner"], "auditor", price)
        self.count(audit["owner"], "audits")

    def pay(self, job_id: bytes, owner: bytes, role: str, amount: int) -> None:
        """SETTLE-9."""
        purse = "audit_budget" if role == "auditor" else "escrow"
        left = self.db[b"j" + job_id][purse] - amount
        assert left >= 0
        self.put_job(job_id, **{purse: left})
        self.move(owner, amount)
        earned = self.zeros(b"p" + job_id + owner)
        self.put(b"p" + job_id + owner, earned, **{role: earned[role] + amount})
        keys = self.db.get(b"P" + job_id, {"keys": []})["keys"]
        self.db[b"P" + job_id] = {"keys": sorted({*keys, owner})}
        self.count(owner, "earned", amount)

    def refund(self, job_id: bytes, reason: str, detail: str) -> None:
        """END-1."""
        for slot in self.living(self.db[b"j" + job_id]):
            while b"s" + job_id + u32(slot) in self.db and self.next_cleared(job_id, slot):
                self.pay_segment(job_id, slot)
        self.end(job_id, "refunded", reason, detail)

    def end(self, job_id: bytes, status: str, reason: str, detail: str) -> None:
        """END-2, END-3, STATE-3."""
        for timer in ("match", "accept", "activate", "deadline", "result", "settle", "standby"):
            self.cancel(timer, job_id)
        job = self.db[b"j" + job_id]
        if job["class_id"]:
            self.stop_rounds(job)
            for slot in self.job_slots(job):
                for timer in ("stall", "replace", "case"):
                    self.cancel(timer, job_id, slot)
                state = self.slot(job_id, slot)
                for number in range(state["settled"], state["committed"]):
                    self.drop(job_id, slot, number)
            self.capacity(job_id, -1)
        self.move(job["submitter"], held(job))
        nothing = dict.fromkeys(
            ("escrow", "audit_budget", "audits_reserved", "fee_budget", "deposit"), 0
        )
        before = self.db.get(b"L", {"job": b""})["job"]
        ending = {"status": status, "reason": reason, "detail": detail, "closed": self.height}
        self.put_job(job_id, **nothing, **ending, previous_closed=before)
        self.db[b"L"] = {"job": job_id}
        self.index(b"j", job_id, False)

    def stop_rounds(self, job: Record) -> None:
        raise NotImplementedError

    def drop(self, job_id: bytes, slot: int, number: int) -> None:
        for timer in ("key", "draw", "audit"):
            self.cancel(timer, job_id, slot, number)
        key = b"u" + job_id + u32(slot) + u64(number)
        audit = self.db.get(key)
        if audit is not None and audit["status"] in OPEN:
            if audit["status"] in HELD:
                self.use(audit["auditor"], "audits_open", -1)
            self.put(key, audit, status="dropped")
