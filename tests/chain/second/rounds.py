"""The second ledger's rounds of lanes that meet once a segment (section 13, ROUND)."""

from itertools import pairwise
from typing import Any

from tests.chain.second.formats import u64
from tests.chain.second.records import Record, rule
from tests.chain.second.settling import Settling


class Rounds(Settling):
    """Whose contributions are in."""

    def lanes(self, job: Record) -> list[int]:
        """Those that are not lost."""
        return [lane for lane in range(job["lanes"]) if lane not in job["lost_lanes"]]

    def living_slots(self, job: Record) -> list[int]:
        stages = len(job["stages"])
        return [lane * stages + stage for lane in self.lanes(job) for stage in range(stages)]

    def contributes(self, job: Record, number: int) -> bool:
        """ROUND-1."""
        return bool(job["lane_mode"] == "diloco" and number + 1 < job["rounds"])

    def the_round(self, job: Record, number: int) -> Record:
        nothing = {
            "attested": [0] * job["lanes"] * len(job["stages"]), "ready": [0] * job["lanes"],
            "decided": 0, "included": [], "contributions": [],
        }  # fmt: skip
        return dict(self.db.get(b"r" + job["id"] + u64(number), nothing))

    def put_round(self, job: Record, number: int, record: Record, **changes: Any) -> None:
        self.db[b"r" + job["id"] + u64(number)] = {**record, **changes}

    def must_wait(self, job: Record, number: int) -> bool:
        """ROUND-5."""
        before = number - 1
        if number == 0 or not self.contributes(job, before):
            return False
        return self.the_round(job, before)["decided"] == 0

    def attest_contributions(self, signer: bytes, what: Record, _: bytes) -> None:
        """ROUND-2."""
        job = self.known(b"j" + what["job"])
        slot, number, said = what["slot"], what["round"], what["lanes"]
        rule(job["status"] == "active" and slot in self.job_slots(job), "ROUND-2")
        worker = self.slot(job["id"], slot)["worker"]
        rule(worker["node"] == signer and worker["session"] != b"", "ROUND-2")
        rule(what["epoch"] == job["epoch"] and self.contributes(job, number), "ROUND-2")
        stages = len(job["stages"])
        lane, stage = divmod(slot, stages)
        others = [other for other in self.lanes(job) if other != lane]
        rule(1 <= len(said) <= 16 and said == [o for o in others if o in said], "ROUND-2")
        record = self.the_round(job, number)
        rule(record["decided"] == 0, "ROUND-2")
        for other in said:
            theirs = self.slot(job["id"], other * stages + stage)
            rule(theirs["committed"] > number, "ROUND-2")
        before = {other for other in range(16) if record["attested"][slot] >> other & 1}
        rule(before < set(said), "ROUND-2")
        record["attested"] = [
            sum(2**other for other in said) if place == slot else old
            for place, old in enumerate(record["attested"])
        ]
        self.look_at_round(job, number, record)

    def is_ready(self, job: Record, number: int, attested: list[int], lane: int) -> bool:
        """ROUND-3."""
        stages, lanes = len(job["stages"]), self.lanes(job)
        for stage in range(stages):
            if self.slot(job["id"], lane * stages + stage)["committed"] <= number:
                return False
            holders = [o for o in lanes if attested[o * stages + stage] >> lane & 1]
            if len({*holders, lane}) * 2 <= len(lanes):
                return False
        return True

    def look_at_round(self, job: Record, number: int, record: Record) -> None:
        """ROUND-3, ROUND-4."""
        lanes = self.lanes(job)
        ready = [
            since or (lane in lanes and self.is_ready(job, number, record["attested"], lane))
            for lane, since in enumerate(record["ready"])
        ]
        record["ready"] = [self.height if since is True else int(since) for since in ready]
        self.put_round(job, number, record)
        present = [lane for lane in lanes if record["ready"][lane]]
        waiting = self.at_height("round", job["id"], 0, number) is not None
        if present == lanes:
            self.decide(job, number)
        elif 2 * len(present) > len(lanes) and not waiting:
            self.set(self.height + self.patience(job, number), "round", job["id"], 0, number)

    def patience(self, job: Record, number: int) -> int:
        """ROUND-4."""
        ends = [job["active"], *(self.the_round(job, n)["decided"] for n in range(number))]
        lasted = sorted([b - a for a, b in pairwise(ends)][-5:])
        usual = lasted[len(lasted) // 2] if lasted else self.rules["segment_window"] // 2
        return max(1, int(usual * self.rules["late_lane_percent"] // 100))

    def decide(self, job: Record, number: int) -> None:
        """ROUND-4."""
        record, stages = self.the_round(job, number), len(job["stages"])
        included = [lane for lane in self.lanes(job) if record["ready"][lane]]
        given = []
        for slot in self.job_slots(job):
            segment = self.segment(job["id"], slot, number) if slot // stages in included else None
            given.append(b"" if segment is None else segment["contribution"])
        put = {"decided": self.height, "included": included, "contributions": given}
        self.put_round(job, number, record, **put)
        self.cancel("round", job["id"], 0, number)
        for slot in self.living_slots(job):
            if self.slot(job["id"], slot)["committed"] > number:
                self.stall_clock(job["id"], slot)

    def round_over(self, job_id: bytes, _: int, number: int) -> None:
        """ROUND-4."""
        self.decide(self.db[b"j" + job_id], number)

    def committed_round(self, job: Record, number: int) -> None:
        """ROUND-3, after a Commit."""
        if self.contributes(job, number):
            record = self.the_round(job, number)
            if record["decided"] == 0:
                self.look_at_round(job, number, record)

    def newest_round(self, job: Record) -> int | None:
        number = max(self.slot(job["id"], s)["committed"] for s in self.living_slots(job)) - 1
        return number if number >= 0 and self.contributes(job, number) else None

    def holding_up(self, job: Record) -> list[int]:
        """ROUND-6."""
        number = self.newest_round(job)
        if number is None or not self.must_wait(job, number + 1):
            return []
        slots, lanes = self.living_slots(job), self.lanes(job)
        late = [s for s in slots if self.slot(job["id"], s)["committed"] <= number]
        if late:
            return late
        attested, all_lanes = self.the_round(job, number)["attested"], sum(2**o for o in lanes)
        own = len(job["stages"])
        return [slot for slot in slots if attested[slot] | 2 ** (slot // own) != all_lanes]

    def void_in_rounds(self, job: Record, slot: int, first: int) -> None:
        """ROUND-7."""
        lane, stage = divmod(slot, len(job["stages"]))
        for number in range(first, first + job["unsettled"]):
            if b"r" + job["id"] + u64(number) not in self.db:
                continue
            record = self.the_round(job, number)
            if record["decided"]:
                continue
            attested = [
                0
                if place == slot
                else mask - (mask & 2**lane if place % len(job["stages"]) == stage else 0)
                for place, mask in enumerate(record["attested"])
            ]
            ready = [
                since if other != lane and self.is_ready(job, number, attested, other) else 0
                for other, since in enumerate(record["ready"])
            ]
            self.put_round(job, number, record, attested=attested, ready=ready)
            if 2 * len([since for since in ready if since]) <= len(self.lanes(job)):
                self.cancel("round", job["id"], 0, number)

    def void_rounds(self, job: Record, boundary: int) -> None:
        """ROUND-8."""
        for number in range(boundary, boundary + job["unsettled"]):
            if self.db.pop(b"r" + job["id"] + u64(number), None) is not None:
                self.cancel("round", job["id"], 0, number)

    def stop_rounds(self, job: Record) -> None:
        number = self.newest_round(job)
        if number is not None:
            self.cancel("round", job["id"], 0, number)
