"""The second ledger's sections 13 and 14: segments and audits."""

from typing import Any

from tests.chain.second.formats import H, u32, u64
from tests.chain.second.records import FIELDS, MILLION, B, Record, named, rule
from tests.chain.second.rounds import Rounds


def whole_wait(hashed: bytes) -> int:
    """AUDIT-7: 2^32 times the binary logarithm of 2^64 over the lot, bit by bit."""
    lot = int.from_bytes(hashed[:8], "big") + 1
    log = len(f"{lot:b}") - 1
    y = lot * 2 ** (64 - log)
    for _ in range(32):
        y = y * y // 2**64
        log *= 2
        if y >= 2**65:
            log, y = log + 1, y // 2
    return 64 * 2**32 - log


class Work(Rounds):
    """What members of a job do, and what the chain does about it."""

    # -- 13: segments

    def works(self, job: Record, slot: int, node: bytes) -> bool:
        """Whether the node is the worker of the slot, and not only asked to be."""
        worker = self.slot(job["id"], slot)["worker"]
        return bool(slot in self.living(job) and worker["session"] and worker["node"] == node)

    def rollback(self, job_id: bytes, boundary: int, detail: str) -> bool:
        raise NotImplementedError

    def vacate(self, job_id: bytes, slot: int, cause: str, barred: bytes = b"") -> None:
        raise NotImplementedError

    def links(self, job: Record, slot: int) -> dict[str, tuple[int, str]]:
        """Link of a slot -> the slot at its other end, and how that one calls it."""
        stages = len(job["stages"])
        lane, stage = divmod(slot, stages)
        first = slot - stage
        found = {}
        if job["ring"] or stage > 0:
            found["up"] = first + (stage + stages - 1) % stages, "down"
        if job["ring"] or stage + 1 < stages:
            found["down"] = first + (stage + 1) % stages, "up"
        if job["lane_mode"] == "sync":
            for other in range(job["lanes"]):
                if other != lane:
                    found[f"lane{other}"] = other * stages + stage, f"lane{lane}"
        return found

    def neighbours(self, job: Record, slot: int) -> list[int]:
        return list(dict.fromkeys(end for end, _ in self.links(job, slot).values()))

    def audit_price(self, job: Record, slot: int) -> int:
        """AUDIT-3."""
        return int(job["audit_price"]) * self.times(job, slot)

    def commit(self, signer: bytes, what: Record, _: bytes) -> None:
        """SEG-1, SEG-2, SEG-4, SEG-5."""
        job_id, slot, number = what["job"], what["slot"], what["segment"]
        job = self.known(b"j" + job_id)
        rule(job["status"] == "active" and slot in self.job_slots(job), "SEG-1")
        state = self.slot(job_id, slot)
        rule(self.works(job, slot, signer), "SEG-1")
        rule(what["epoch"] == job["epoch"], "SEG-1")
        rule(what["incarnation"] == state["incarnation"], "SEG-1")
        rule(number == state["committed"] and number < job["rounds"], "SEG-1")
        rule(state["committed"] - state["settled"] < job["unsettled"], "SEG-1")
        start = state["genesis"]["shared"], state["genesis"]["lane"]
        if number:
            before = self.segment(job_id, slot, number - 1)
            assert before is not None
            start = before["end_shared"], before["end_lane"]
        rule((what["start_shared"], what["start_lane"]) == start, "SEG-1")
        links = [named("link sent received", row) or {} for row in what["links"]]
        ends = self.links(job, slot)
        rule([link["link"] for link in links] == list(ends), "SEG-1")
        rule(not self.must_wait(job, number), "ROUND-5")
        rule(len(what["contribution"]) == 32 * self.contributes(job, number), "ROUND-1")
        copy = (number + 1) % job["state_every"] == 0 or number + 1 == job["rounds"]
        held = job["standby"] is not None and job["standby"]["session"] != b""
        copy = copy and held and not self.is_own(job, slot)
        key_at = self.after("draw_delay")
        names = FIELDS["g"].split()
        self.db[b"g" + job_id + u32(slot) + u64(number)] = {
            **dict.fromkeys(names, 0),
            **{name: what[name] for name in names if name in what},
            "worker": signer, "links": links, "committed": self.height, "status": "committed",
            "note": "", "proof": "waiting" if copy else "none", "proof_key": b"",
            "proof_until": key_at + self.rules["standby_window"] if copy else 0,
            "standby_hash": b"", "worker_hash": b"", "holder": b"", "forced": False,
        }  # fmt: skip
        if copy:
            self.set(key_at, "key", job_id, slot, number)
        self.put_slot(job_id, slot, committed=number + 1, last_commit=self.height)
        self.stall_clock(job_id, slot)
        for link in links:
            far, opposite = ends[link["link"]]
            other = self.segment(job_id, far, number)
            if other is None:
                continue
            (end,) = (roots for roots in other["links"] if roots["link"] == opposite)
            if (link["sent"], link["received"]) != (end["received"], end["sent"]):
                pair = sorted((slot, far))
                for party in pair:
                    self.count(self.slot(job_id, party)["worker"]["owner"], "mismatches")
                text = (
                    f"segment {number}: slots {pair[0]} and {pair[1]} "
                    "committed to different frames on their link"
                )
                self.refund(job_id, "mismatch", text)
                return
        text = self.other_contribution(job, slot, what) or self.other_states(job, slot, number)
        if text:
            self.refund(job_id, "mismatch", text)
            return
        for place in (slot, *self.neighbours(job, slot)):
            mine = self.segment(job_id, place, number)
            others = [self.segment(job_id, end, number) for end in self.neighbours(job, place)]
            if mine is not None and mine["status"] == "committed" and None not in others:
                self.put_segment(job_id, place, number, status="linked", linked=self.height)
                self.set(self.after("draw_delay"), "draw", job_id, place, number)
        self.committed_round(job, number)

    def other_contribution(self, job: Record, slot: int, what: Record) -> str:
        """SEG-10."""
        record = self.the_round(job, what["segment"])
        given = record["contributions"][slot] if record["decided"] else b""
        if given in (b"", what["contribution"]):
            return ""
        return (
            f"segment {what['segment']}: slot {slot} contributes something else than the others "
            "began with"
        )

    def other_states(self, job: Record, slot: int, number: int) -> str:
        """SEG-11."""
        stages = len(job["stages"])
        stage, others = slot % stages, {}
        for lane in self.lanes(job):
            theirs = self.segment(job["id"], lane * stages + stage, number)
            if theirs is not None and lane * stages + stage != slot:
                others[lane * stages + stage] = theirs
        mine = self.segment(job["id"], slot, number)
        assert mine is not None
        known = any(theirs["forced"] for theirs in others.values())
        if not known and all(one["end_shared"] == mine["end_shared"] for one in others.values()):
            return ""
        if job["audit_rate"] == 0:
            return f"segment {number}: lanes differ in stage {stage}, and the offer wants no audits"
        for party, theirs in {**others, slot: mine}.items():
            if theirs["forced"]:
                continue
            if theirs["status"] in ("unaudited", "audited_by_submitter"):
                return self.not_audited(job, party, number)
            self.put_segment(job["id"], party, number, forced=True)
            if theirs["status"] == "undrawn":
                self.put_segment(job["id"], party, number, status="linked")
                self.set(self.after("draw_delay"), "draw", job["id"], party, number)
        return ""

    def not_audited(self, job: Record, slot: int, number: int) -> str:
        stage = slot % len(job["stages"])
        return f"segment {number}: lanes differ in stage {stage}, and slot {slot} was not audited"

    def proof_key(self, job_id: bytes, slot: int, number: int) -> None:
        """SEG-8."""
        self.put_segment(job_id, slot, number, proof_key=self.mix)

    def standby_proof(self, signer: bytes, what: Record, _: bytes) -> None:
        """SEG-9."""
        job_id, slot, number = what["job"], what["slot"], what["segment"]
        job = self.known(b"j" + job_id)
        rule(job["status"] == "active" and slot in self.job_slots(job), "SEG-9")
        segment = self.known(b"g" + job_id + u32(slot) + u64(number))
        rule(what["epoch"] == job["epoch"], "SEG-9")
        rule(what["incarnation"] == segment["incarnation"], "SEG-9")
        rule(segment["proof"] == "waiting" and segment["proof_key"] != b"", "SEG-9")
        rule(self.height < segment["proof_until"], "SEG-9")
        mine = what["keyed_hash"]
        standby = job["standby"]
        if standby is not None and standby["session"] and signer == standby["node"]:
            rule(segment["standby_hash"] == b"", "SEG-9")
            until = max(segment["proof_until"], self.after("answer_window"))
            found = {"standby_hash": mine, "holder": standby["owner"], "proof_until": until}
            self.put_segment(job_id, slot, number, **found)
            return
        rule(signer == self.slot(job_id, slot)["worker"]["node"], "SEG-9")
        rule(segment["standby_hash"] != b"", "SEG-9")
        proof = "equal" if mine == segment["standby_hash"] else "unequal"
        self.put_segment(job_id, slot, number, worker_hash=mine, proof=proof)
        self.arm(job_id)

    # -- 14: audits

    def draw(self, job_id: bytes, slot: int, number: int) -> None:
        """AUDIT-1 to AUDIT-5."""
        job = self.db[b"j" + job_id]
        lot = int.from_bytes(H(self.mix, job_id, u32(slot), u64(number))[:8], "big")
        segment = self.segment(job_id, slot, number)
        assert segment is not None
        tainted = self.db.get(b"T", {"height": 0})["height"] > segment["linked"]
        drawn = tainted or lot * MILLION < job["audit_rate"] * 2**64
        drawn = drawn and job["audit_rate"] and not self.is_own(job, slot)
        price = self.audit_price(job, slot)
        if not (drawn or segment["forced"]):
            self.go_on(job_id, slot, number, "undrawn", "")
        elif job["audit_budget"] - job["audits_reserved"] < price:
            self.go_on(job_id, slot, number, "unaudited", "the audit budget is spent")
        else:
            auditor = self.choose(job, slot, number, 0, [])
            if auditor is None and not self.eligible(job, [], busy=True):
                note = "no other owner can audit it"
                self.go_on(job_id, slot, number, "audited_by_submitter", note)
                return
            reserved = job["audits_reserved"] + price
            self.put_job(job_id, audits_reserved=reserved)
            self.put_segment(job_id, slot, number, status="drawn")
            if auditor is None:
                fresh = {**self.new_audit(0, []), "drawn": self.height}
                self.wait(job_id, slot, number, fresh)
            else:
                self.assign(job_id, slot, number, auditor, 0, [])

    def go_on(self, job_id: bytes, slot: int, number: int, status: str, note: str) -> None:
        self.put_segment(job_id, slot, number, status=status, note=note)
        segment = self.segment(job_id, slot, number)
        assert segment is not None
        if segment["forced"] and status != "undrawn":
            job = self.db[b"j" + job_id]
            self.refund(job_id, "mismatch", self.not_audited(job, slot, number))
            return
        self.arm(job_id)

    def stake(self, owner: bytes) -> int:
        return int(self.account(owner)["work_stake"]) + (owner in self.auditors)

    def eligible(
        self, job: Record, tried: list[bytes], *, busy: bool = False
    ) -> dict[bytes, list[tuple[bytes, bytes]]]:
        """AUDIT-6: owner -> its nodes with their sessions, in order."""
        workers = {self.slot(job["id"], slot)["worker"]["owner"] for slot in self.living(job)}
        source = self.db[b"n" + job["source"]]["owner"]
        party = {job["submitter"], source, *tried, *workers, *job["excluded"]}
        found: dict[bytes, list[tuple[bytes, bytes]]] = {}
        for node, ask in sorted(self.asks(), key=lambda row: row[0]):
            record = self.db[b"n" + node]
            if (
                ask["class_id"] == job["class_id"]
                and ask["until_height"] >= self.height
                and ask["audit_capacity"] > 0
                and (busy or record["audits_open"] < ask["audit_capacity"])
                and record["owner"] not in party
                and self.stake(record["owner"])
            ):
                found.setdefault(record["owner"], []).append((node, ask["session"]))
        return found

    def choose(
        self, job: Record, slot: int, number: int, attempt: int, tried: list[bytes]
    ) -> tuple[bytes, bytes, bytes] | None:
        """AUDIT-7: (node, owner, session)."""
        lots = H(b"auditor", self.mix, job["id"], u32(slot), u64(number), u32(attempt))
        pool = self.eligible(job, tried)
        holder = None if job["standby"] is None else job["standby"]["owner"]
        if any(owner != holder for owner in self.eligible(job, tried, busy=True)):
            pool = {owner: nodes for owner, nodes in pool.items() if owner != holder}
        if not pool:
            return None
        waits = [
            (whole_wait(H(lots, owner)) * 2**128 // self.stake(owner), owner) for owner in pool
        ]
        owner = min(waits)[1]
        node, session = pool[owner][int.from_bytes(lots[24:32], "big") % len(pool[owner])]
        return node, owner, session

    def new_audit(self, attempt: int, tried: list[bytes]) -> Record:
        names = "auditor owner session hash salt steps worker_list auditor_list"
        return {
            **dict.fromkeys(FIELDS["u"].split(), 0), **dict.fromkeys(names.split(), b""),
            "attempt": attempt, "tried": tried, "status": "drawn", "missing": "",
        }  # fmt: skip

    def assign(
        self,
        job_id: bytes,
        slot: int,
        number: int,
        auditor: tuple[bytes, bytes, bytes],
        attempt: int,
        tried: list[bytes],
    ) -> None:
        """AUDIT-8."""
        node, owner, session = auditor
        until = self.after("audit_window")
        who = {"auditor": node, "owner": owner, "session": session}
        audit = {**self.new_audit(attempt, tried), **who, "drawn": self.height, "until": until}
        self.db[b"u" + job_id + u32(slot) + u64(number)] = audit
        self.use(node, "audits_open", 1)
        self.set(until, "audit", job_id, slot, number)

    def wait(self, job_id: bytes, slot: int, number: int, audit: Record) -> None:
        """AUDIT-9."""
        until = self.after("draw_delay")
        nobody = dict.fromkeys(("auditor", "owner", "session"), b"")
        key = b"u" + job_id + u32(slot) + u64(number)
        self.put(key, audit, **nobody, status="waiting", until=until)
        self.set(until, "audit", job_id, slot, number)

    def spoken_of(self, what: Record) -> tuple[bytes, Record, Record, Record]:
        job = self.known(b"j" + what["job"])
        rule(job["status"] == "active" and what["epoch"] == job["epoch"], "AUDIT-10")
        rule(what["slot"] in self.job_slots(job), "AUDIT-10")
        place = what["job"] + u32(what["slot"]) + u64(what["segment"])
        return b"u" + place, self.known(b"u" + place), self.known(b"g" + place), job

    def step(self, key: bytes, what: Record, status: str, until: int, **changes: Any) -> None:
        self.put(key, self.db[key], status=status, until=until, **changes)
        self.set(until, "audit", what["job"], what["slot"], what["segment"])

    def audit_commit(self, signer: bytes, what: Record, _: bytes) -> None:
        key, audit, _, _ = self.spoken_of(what)
        rule(signer == audit["auditor"] and audit["status"] == "drawn", "AUDIT-10")
        self.step(key, what, "committed", self.after("open_window"), hash=what["hash"])

    def audit_fail(self, signer: bytes, what: Record, _: bytes) -> None:
        key, audit, _, _ = self.spoken_of(what)
        rule(signer == audit["auditor"] and audit["status"] == "drawn", "AUDIT-10")
        self.use(signer, "audits_open", -1)
        self.step(key, what, "failed", self.after("draw_delay"), missing=what["missing"])

    def open(self, signer: bytes, what: Record, _: bytes) -> None:
        key, audit, segment, job = self.spoken_of(what)
        rule(signer == segment["worker"] and audit["status"] == "committed", "AUDIT-10")
        rule(B(what["salt"], what["steps"]) == segment["seal"], "AUDIT-10")
        lane, stage = divmod(what["slot"], len(job["stages"]))
        root = B(
            what["job"], u32(lane), u32(stage), u64(what["segment"]),
            segment["start_shared"], segment["start_lane"],
            segment["end_shared"], segment["end_lane"],
            *(link["sent"] + link["received"] for link in segment["links"]),
            segment["contribution"], what["steps"],
        )  # fmt: skip
        opening = {"salt": what["salt"], "steps": what["steps"], "worker_list": root}
        self.step(key, what, "opened", self.after("reveal_window"), **opening)

    def audit_open(self, signer: bytes, what: Record, _: bytes) -> None:
        """AUDIT-10, AUDIT-11."""
        key, audit, _, _ = self.spoken_of(what)
        job_id, slot, number = what["job"], what["slot"], what["segment"]
        rule(signer == audit["auditor"] and audit["status"] == "opened", "AUDIT-10")
        rule(B(what["list_root"], what["salt"], signer) == audit["hash"], "AUDIT-10")
        self.cancel("audit", job_id, slot, number)
        self.use(signer, "audits_open", -1)
        verdict = "passed" if what["list_root"] == audit["worker_list"] else "mismatch"
        self.put(key, audit, auditor_list=what["list_root"], status=verdict)
        self.put_segment(job_id, slot, number, status=verdict)
        if verdict == "passed":
            self.arm(job_id)
            return
        self.pay_auditor(job_id, key)
        text = f"slot {slot}, segment {number}: the auditor's replay differs from the commitment"
        if self.rollback(job_id, number, text):
            self.vacate(job_id, slot, "mismatch", audit["owner"])

    def audit_over(self, job_id: bytes, slot: int, number: int) -> None:
        """AUDIT-13 to AUDIT-15."""
        job, key = self.db[b"j" + job_id], b"u" + job_id + u32(slot) + u64(number)
        audit = self.db[key]
        status = audit["status"]
        if status == "committed":
            self.put(key, audit, status="unopened")
            self.use(audit["auditor"], "audits_open", -1)
            price = job["audit_price"] * self.times(job, slot)
            self.put_job(job_id, audits_reserved=job["audits_reserved"] - price)
            text = f"slot {slot}, segment {number}: the worker did not open its seal"
            if self.rollback(job_id, number, text):
                self.vacate(job_id, slot, "unopened", audit["owner"])
            return
        if status in ("drawn", "opened"):
            self.use(audit["auditor"], "audits_open", -1)
            self.count(audit["owner"], "faults")
        if status == "opened":
            note = "the auditor did not open its commitment"
            self.no_verdict(job_id, slot, number, audit, note)
            return
        if status in ("drawn", "failed"):
            tried, attempt = [*audit["tried"], audit["owner"]], audit["attempt"] + 1
            audit = {**audit, "tried": tried, "attempt": attempt, "drawn": self.height}
        attempt, tried = audit["attempt"], audit["tried"]
        if attempt > self.rules["audit_redraws"]:
            note = f"{attempt} auditors did not come through"
            self.no_verdict(job_id, slot, number, audit, note)
            return
        auditor = self.choose(job, slot, number, attempt, tried)
        longest = self.rules["audit_window"] * job["unsettled"]
        if auditor is not None:
            self.assign(job_id, slot, number, auditor, attempt, tried)
        elif not self.eligible(job, tried, busy=True):
            self.no_verdict(job_id, slot, number, audit, "no other auditor is left")
        elif self.height - audit["drawn"] > longest:
            self.no_verdict(job_id, slot, number, audit, "every auditor was busy for too long")
        else:
            self.wait(job_id, slot, number, audit)

    def no_verdict(self, job_id: bytes, slot: int, number: int, audit: Record, note: str) -> None:
        """AUDIT-16."""
        self.put(b"u" + job_id + u32(slot) + u64(number), audit, status="silent")
        job = self.db[b"j" + job_id]
        reserved = job["audits_reserved"] - self.audit_price(job, slot)
        self.put_job(job_id, audits_reserved=reserved)
        self.go_on(job_id, slot, number, "unaudited", note)
