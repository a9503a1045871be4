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

    def at_limit(self, job: Record, state: Record) -> bool:
        return bool(
            state["committed"] < job["rounds"]
            and state["committed"] - state["settled"] >= job["unsettled"]
        )

    def stall_clock(self, job_id: bytes, slot: int) -> None:
        """SEG-6."""
        job, state = self.db[b"j" + job_id], self.slot(job_id, slot)
        if state["committed"] == job["rounds"] or self.at_limit(job, state):
            self.cancel("stall", job_id, slot)
        else:
            self.set(self.after("segment_window"), "stall", job_id, slot)

    def waits(self, job_id: bytes, slot: int) -> bool:
        """SEG-7."""
        job, state = self.db[b"j" + job_id], self.slot(job_id, slot)
        if not self.at_limit(job, state):
            return False
        segment = self.segment(job_id, slot, state["settled"])
        return segment is not None and segment["status"] != "committed"

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

    def arm(self, job_id: bytes, slot: int) -> None:
        """SETTLE-2."""
        state = self.slot(job_id, slot)
        if state["settled"] == state["committed"]:
            return
        segment = self.next_cleared(job_id, slot)
        if segment is None:
            self.cancel("settle", job_id, slot)
        else:
            self.set(max(self.height + 1, self.ready_at(segment)), "settle", job_id, slot)

    def settle(self, job_id: bytes, slot: int, _: int) -> None:
        """SETTLE-4, JOB-9."""
        job = self.db[b"j" + job_id]
        limited = self.at_limit(job, self.slot(job_id, slot))
        while (segment := self.next_cleared(job_id, slot)) is not None:
            if self.ready_at(segment) > self.height:
                break
            self.pay_segment(job_id, slot)
        slots = self.job_slots(job)
        if all(self.slot(job_id, other)["settled"] == job["rounds"] for other in slots):
            self.put_job(job_id, status="finishing", finished=self.height)
            self.cancel("deadline", job_id)
            self.set(self.after("result_window"), "result", job_id)
            return
        self.arm(job_id, slot)
        if limited and not self.at_limit(job, self.slot(job_id, slot)):
            for other in slots:
                self.stall_clock(job_id, other)

    def pay_segment(self, job_id: bytes, slot: int) -> None:
        """SETTLE-5 to SETTLE-8."""
        job, state = self.db[b"j" + job_id], self.slot(job_id, slot)
        number, worker = state["settled"], state["worker"]
        segment = self.segment(job_id, slot, number)
        assert segment is not None
        self.put_slot(job_id, slot, settled=number + 1)
        proof = "missing" if segment["proof"] == "waiting" else segment["proof"]
        self.put_segment(job_id, slot, number, settled=self.height, proof=proof)
        self.pay(job_id, worker["owner"], "worker", worker["price"])
        self.count(worker["owner"], "segments")
        if proof == "equal":
            amount = job["standby_price"] * (number % job["state_every"] + 1)
            self.pay(job_id, job["standby"]["owner"], "standby", amount)
            self.count(job["standby"]["owner"], "proofs")
        key = b"u" + job_id + u32(slot) + u64(number)
        if key in self.db and self.db[key]["status"] == "passed":
            self.pay_auditor(job_id, key)

    def pay_auditor(self, job_id: bytes, key: bytes) -> None:
        """SETTLE-8."""
        job, audit = self.db[b"j" + job_id], self.db[key]
        price = job["audit_price"]
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
        for slot in self.job_slots(self.db[b"j" + job_id]):
            while b"s" + job_id + u32(slot) in self.db and self.next_cleared(job_id, slot):
                self.pay_segment(job_id, slot)
        self.end(job_id, "refunded", reason, detail)

    def end(self, job_id: bytes, status: str, reason: str, detail: str) -> None:
        """END-2, END-3, STATE-3."""
        for timer in ("match", "accept", "activate", "deadline", "result"):
            self.cancel(timer, job_id)
        job = self.db[b"j" + job_id]
        if job["standby"] is not None:
            for slot in self.job_slots(job):
                self.cancel("stall", job_id, slot)
                self.cancel("settle", job_id, slot)
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

    def drop(self, job_id: bytes, slot: int, number: int) -> None:
        for timer in ("key", "draw", "audit"):
            self.cancel(timer, job_id, slot, number)
        key = b"u" + job_id + u32(slot) + u64(number)
        audit = self.db.get(key)
        if audit is not None and audit["status"] in OPEN:
            if audit["status"] in HELD:
                self.use(audit["auditor"], "audits_open", -1)
            self.put(key, audit, status="dropped")
