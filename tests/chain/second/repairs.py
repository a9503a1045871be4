"""The second ledger's vacancies, rollbacks and accusations (section 12: VAC, CASE, JOB-5)."""

from typing import Any

from tests.chain.second.formats import ZERO, u32, u64
from tests.chain.second.market import STANDBY, Market, member
from tests.chain.second.records import Record, rule
from tests.chain.second.settling import HELD, OPEN

LACKING = {"unequal", "missing"}
FAULTS = {"absent", "undelivered", "stall", "left", "unproven", "unanswered"}
WRONG = {"mismatch", "unopened"}
INCARNATIONS, ROLLBACKS, STANDBY_TURNS, STALLS, OF_PAIR, UNPROVEN = 20, 8, 32, 32, 3, 2


class Repairs(Market):
    """Who loses a place, who gets it, and what is begun anew."""

    def the_job(self, job_id: bytes) -> Record:
        return self.db[b"j" + job_id]

    def blame(self, owner: bytes, cause: str) -> None:
        """VAC-1."""
        if cause in FAULTS | WRONG:
            self.count(owner, "faults" if cause in FAULTS else "mismatches")

    # -- slots

    def void(self, job_id: bytes, slot: int, first: int) -> None:
        """VAC-3."""
        state = self.slot(job_id, slot)
        for number in range(first, state["committed"]):
            for timer in ("key", "draw", "audit"):
                self.cancel(timer, job_id, slot, number)
            place = job_id + u32(slot) + u64(number)
            audit = self.db.get(b"u" + place)
            if audit is not None and audit["status"] == "passed":
                self.pay_auditor(job_id, b"u" + place)
            elif audit is not None and audit["status"] in OPEN:
                if audit["status"] in HELD:
                    self.use(audit["auditor"], "audits_open", -1)
                job = self.the_job(job_id)
                left = job["audits_reserved"] - self.audit_price(job, slot)
                self.put_job(job_id, audits_reserved=left)
            self.db.pop(b"u" + place, None)
            del self.db[b"g" + place]
        if first < state["committed"]:
            self.put_slot(job_id, slot, committed=first)
            self.void_in_rounds(self.the_job(job_id), slot, first)

    def vacate(self, job_id: bytes, slot: int, cause: str, barred: bytes = b"") -> None:
        """VAC-2."""
        job, state = self.the_job(job_id), self.slot(job_id, slot)
        owner = state["worker"]["owner"]
        self.blame(owner, cause)
        if self.is_own(job, slot):
            text = f"slot {slot} is the source's own, and became vacant: {cause}"
            self.refund(job_id, "mismatch" if cause in WRONG else "fault", text)
            return
        self.void(job_id, slot, state["settled"])
        self.void_in_rounds(job, slot, state["settled"])
        self.end_cases(job_id, slot)
        self.put_job(job_id, excluded=sorted({*self.the_job(job_id)["excluded"], owner}))
        self.put_slot(job_id, slot, barred=barred, unproven=0, delivered=[])
        self.pass_over(job_id, slot, cause)
        if self.the_job(job_id)["status"] == "active":
            self.new_windows(job_id)
            self.arm(job_id)

    def pass_over(self, job_id: bytes, slot: int, cause: str) -> None:
        """VAC-4."""
        job, state = self.the_job(job_id), self.slot(job_id, slot)
        last, turn = state["worker"], state["incarnation"] + 1
        former = {
            "node": last["node"], "owner": last["owner"], "cause": cause, "epoch": job["epoch"],
            "incarnation": state["incarnation"], "settled": state["settled"],
            "height": self.height,
        }  # fmt: skip
        changes: Record = {"worker": {**last, "session": b""}, "since": 0, "incarnation": turn}
        self.put_slot(job_id, slot, **changes, former=[*state["former"], former])
        self.cancel("stall", job_id, slot)
        self.cancel("replace", job_id, slot)
        found = self.successor(job, slot) if turn <= INCARNATIONS else None
        if found is not None:
            self.use_slot(job, slot, last["node"], -1)
            self.use_slot(job, slot, found["node"], 1)
            self.put_slot(job_id, slot, worker=found)
            self.set(self.after("accept_window"), "replace", job_id, slot)
        elif job["lane_mode"] == "diloco" and len(self.lanes(job)) > 1:
            self.lose(job_id, slot // len(job["stages"]))
        else:
            text = f"slot {slot} became vacant, and nobody is left to take it: {cause}"
            self.refund(job_id, "mismatch" if cause in WRONG else "fault", text)

    def successor(self, job: Record, slot: int) -> Record | None:
        """VAC-5."""
        stages = len(job["stages"])
        others = {s: self.slot(job["id"], s)["worker"] for s in self.living(job) if s != slot}
        in_lane = [one["owner"] for s, one in others.items() if s // stages == slot // stages]
        ends = [self.slot(job["id"], s)["worker"]["node"] for s in self.neighbours(job, slot)]
        nothing: Record = {"open": 0, "paths": []}
        asks = [(node, self.db.get(b"k" + node, nothing)) for node in ends]
        fitting = []
        for node, ask, record in self.candidates(job):
            price = self.price(job, slot, ask)
            if (
                ask["class_id"] == job["class_id"]
                and node != job["source"]
                and record["owner"] != self.slot(job["id"], slot)["barred"]
                and ask["memory"] - record["memory_used"] >= job["stages"][slot % stages]["memory"]
                and price <= job["slot_price_max"] * self.times(job, slot)
                and node not in [one["node"] for one in others.values()]
                and record["owner"] not in in_lane
                and all(self.path((node, ask), end) for end in asks)
            ):
                fitting.append((node, record["owner"], price))
        standby = job["standby"]
        if standby is not None:
            for node, owner, price in fitting:
                if standby["session"] and node == standby["node"]:
                    return member(node, owner, price)
            fitting = [row for row in fitting if row[1] != standby["owner"]]
        ranks = [
            (price * self.weight(owner), self.lot(job, node, slot), member(node, owner, price))
            for node, owner, price in fitting
        ]
        return min(ranks, key=lambda row: row[:2])[2] if ranks else None

    def lose(self, job_id: bytes, lane: int) -> None:
        """VAC-6."""
        job = self.the_job(job_id)
        for slot in self.living(job):
            if slot // len(job["stages"]) == lane:
                state = self.slot(job_id, slot)
                self.void(job_id, slot, state["settled"])
                self.end_cases(job_id, slot)
                self.use_slot(job, slot, state["worker"]["node"], -1)
                self.cancel("stall", job_id, slot)
                self.cancel("replace", job_id, slot)
        self.put_job(job_id, lost_lanes=sorted([*self.the_job(job_id)["lost_lanes"], lane]))
        job = self.the_job(job_id)
        newest = self.newest_round(job)
        if newest is not None:
            self.committed_round(job, newest)
        self.arm(job_id)

    def new_windows(self, job_id: bytes) -> None:
        """VAC-7."""
        self.put_job(job_id, repaired=self.height)
        for slot in self.living(self.the_job(job_id)):
            self.stall_clock(job_id, slot, "activate_window")

    def asked_place(self, signer: bytes, what: Record) -> tuple[Record, Record | None]:
        """VAC-8."""
        job, state = self.the_job(what["job"]), None
        if what["slot"] == STANDBY:
            place, turn = job["standby"], job["standby_turn"]
        else:
            rule(what["slot"] in self.living(job), "VAC-8")
            state = self.slot(what["job"], what["slot"])
            place, turn = state["worker"], state["incarnation"]
        rule(what["attempt"] == turn and place is not None, "VAC-8")
        rule(place["node"] == signer and place["session"] == b"", "VAC-8")
        return place, state

    def accept(self, signer: bytes, what: Record, tx: bytes) -> None:
        """VAC-9."""
        job_id, job = what["job"], self.known(b"j" + what["job"])
        if job["status"] != "active":
            super().accept(signer, what, tx)
            return
        place, state = self.asked_place(signer, what)
        rule(what["session"] != ZERO, "VAC-9")
        taken = {**place, "session": what["session"]}
        if state is None:
            self.cancel("standby", job_id)
            self.put_job(job_id, standby=taken, standby_since=self.height)
            for slot in self.living(job):
                self.put_slot(job_id, slot, unproven=0)
            return
        self.cancel("replace", job_id, what["slot"])
        self.put_slot(job_id, what["slot"], worker=taken, since=self.height, barred=b"")
        if job["standby"] is not None and job["standby"]["node"] == signer:
            self.vacate_standby(job_id, "moved")
        self.new_windows(job_id)

    def decline(self, signer: bytes, what: Record, tx: bytes) -> None:
        """VAC-10."""
        if self.known(b"j" + what["job"])["status"] != "active":
            super().decline(signer, what, tx)
            return
        _, state = self.asked_place(signer, what)
        self.without(what["job"], signer)
        if state is None:
            self.vacate_standby(what["job"], "declined")
        else:
            self.pass_over(what["job"], what["slot"], "declined")

    def without(self, job_id: bytes, node: bytes) -> None:
        self.put_job(job_id, declined=sorted({*self.the_job(job_id)["declined"], node}))

    def replace_over(self, job_id: bytes, slot: int, _: int) -> None:
        """VAC-11."""
        silent, standby = self.slot(job_id, slot)["worker"], self.the_job(job_id)["standby"]
        self.count(silent["owner"], "faults")
        self.without(job_id, silent["node"])
        if standby is not None and standby["node"] == silent["node"]:
            self.vacate_standby(job_id, "unanswered", blamed=True)
        self.pass_over(job_id, slot, "unanswered")

    # -- the standby

    def vacate_standby(self, job_id: bytes, cause: str, *, blamed: bool = False) -> None:
        """VAC-12."""
        job = self.the_job(job_id)
        standby = job["standby"]
        if standby is None:
            return
        if not blamed:
            self.blame(standby["owner"], cause)
        self.use_standby(job, standby["node"], -1)
        if cause not in ("unanswered", "declined", "moved"):
            self.put_job(job_id, excluded=sorted({*job["excluded"], standby["owner"]}))
        self.put_job(job_id, standby=None, standby_turn=job["standby_turn"] + 1)
        for slot in self.living(job):
            state = self.slot(job_id, slot)
            if state["committed"] > state["settled"]:
                self.put_slot(job_id, slot, held=state["settled"])
        self.set(self.height + 1, "standby", job_id)

    def standby_over(self, job_id: bytes, *_: int) -> None:
        """VAC-13."""
        job = self.the_job(job_id)
        if job["standby"] is not None:
            self.without(job_id, job["standby"]["node"])
            self.vacate_standby(job_id, "unanswered")
            return
        if job["standby_turn"] > STANDBY_TURNS:
            return
        rows = [row for row in self.candidates(job) if row[1]["class_id"] == job["class_id"]]
        owners = {self.slot(job_id, slot)["worker"]["owner"] for slot in self.living(job)}
        found = self.cast_standby(job, rows, owners)
        self.set(self.after("accept_window"), "standby", job_id)
        if found is not None:
            self.use_standby(job, found["node"], 1)
            self.put_job(job_id, standby=found)

    def settle(self, job_id: bytes, *_: int) -> None:
        """SETTLE-4, VAC-14, VAC-15."""
        self.settle_rounds(job_id)
        job = self.the_job(job_id)
        standby = job["standby"]
        if job["status"] != "active":
            if standby is not None and standby["session"] == b"":
                self.use_standby(job, standby["node"], -1)
                self.put_job(job_id, standby=None)
            for slot in self.living(job):
                if self.slot(job_id, slot)["case"] is not None:
                    self.end_case(job_id, slot)
            return
        for slot in self.living(job):
            if slot not in self.living(self.the_job(job_id)):
                continue
            standby, state = self.the_job(job_id)["standby"], self.slot(job_id, slot)
            if standby is None or standby["session"] == b"" or state["unproven"] < UNPROVEN:
                continue
            segments = (self.segment(job_id, slot, n) for n in range(state["settled"] - 1, -1, -1))
            last = next(one for one in segments if one is not None and one["proof"] in LACKING)
            if last["proof"] == "unequal":
                self.vacate_standby(job_id, "unequal")
            elif last["standby_hash"] == b"":
                self.vacate_standby(job_id, "unproven")
            else:
                self.vacate(job_id, slot, "unproven")
            if self.the_job(job_id)["status"] != "active":
                return

    def rollback(self, job_id: bytes, boundary: int, detail: str) -> bool:
        """VAC-16."""
        job = self.the_job(job_id)
        if job["epoch"] == ROLLBACKS:
            self.refund(job_id, "mismatch", detail)
            return False
        for slot in self.living(job):
            self.end_cases(job_id, slot)
            self.void(job_id, slot, max(boundary, self.slot(job_id, slot)["settled"]))
        self.void_rounds(self.the_job(job_id), boundary)
        self.put_job(job_id, epoch=job["epoch"] + 1)
        self.new_windows(job_id)
        self.arm(job_id)
        return True

    # -- accusations

    def end_cases(self, job_id: bytes, slot: int) -> None:
        """CASE-7."""
        for end in self.neighbours(self.the_job(job_id), slot):
            state = self.slot(job_id, end)
            kept = [accuser for accuser in state["delivered"] if accuser != slot]
            self.put_slot(job_id, end, delivered=kept)
            if state["case"] is not None and state["case"]["accuser"] == slot:
                self.end_case(job_id, end)
        if self.slot(job_id, slot)["case"] is not None:
            self.end_case(job_id, slot)

    def end_case(self, job_id: bytes, slot: int) -> None:
        self.cancel("case", job_id, slot)
        self.put_slot(job_id, slot, case=None)

    def by_worker(self, signer: bytes, what: Record) -> tuple[Record, Record]:
        """CASE-1."""
        job = self.known(b"j" + what["job"])
        rule(job["status"] == "active" and what["slot"] in self.job_slots(job), "CASE-1")
        state = self.slot(what["job"], what["slot"])
        rule(self.works(job, what["slot"], signer), "CASE-1")
        rule(what["epoch"] == job["epoch"], "CASE-1")
        rule(what["incarnation"] == state["incarnation"], "CASE-1")
        return job, state

    def leave(self, signer: bytes, what: Record, _: bytes) -> None:
        """VAC-17."""
        self.by_worker(signer, what)
        self.vacate(what["job"], what["slot"], "left")

    def room(self, job: Record, slot: int) -> int:
        """SETTLE-11."""
        states = [self.slot(job["id"], one) for one in (slot, *self.neighbours(job, slot))]
        kept = min(state["held"] for state in states)
        settled = states[0]["settled"]
        far = max(kept + job["unsettled"] + 2 * job["state_every"], settled + job["state_every"])
        return int(min(job["rounds"], settled + job["unsettled"], far))

    def stall(self, signer: bytes, what: Record, _: bytes) -> None:
        """CASE-2, CASE-3."""
        job_id, mine = what["job"], what["slot"]
        job, state = self.by_worker(signer, what)
        rule(what["number"] == state["stalls"] < STALLS, "CASE-2")
        links = self.links(job, mine)
        rule(what["link"] in links, "CASE-2")
        slot = links[what["link"]][0]
        accused = self.slot(job_id, slot)
        rule(slot in self.living(job) and accused["worker"]["session"] != b"", "CASE-2")
        rule(accused["case"] is None, "CASE-2")
        for other in self.neighbours(job, slot):
            case = self.slot(job_id, other)["case"]
            rule(other == mine or case is None or case["accuser"] != slot, "CASE-2")
        ahead = accused["committed"] > state["committed"]
        rule(ahead or accused["committed"] < self.room(job, slot), "CASE-2")
        if state["case"] is not None and state["case"]["accuser"] != slot:
            self.end_case(job_id, mine)
        self.put_slot(job_id, mine, stalls=state["stalls"] + 1)
        until = self.after("answer_window")
        case = {"accuser": mine, "link": what["link"], "seq": what["seq"], "opened": self.height}
        self.put_slot(job_id, slot, case={**case, "until": until, "present": False})
        self.set(until, "case", job_id, slot)

    def present(self, signer: bytes, what: Record, _: bytes) -> None:
        """CASE-4."""
        job, state = self.by_worker(signer, what)
        case, standby = state["case"], job["standby"]
        rule(case is not None and case["opened"] == what["opened"], "CASE-4")
        rule(not case["present"], "CASE-4")
        if standby is None or standby["session"] == b"":
            self.end_case(what["job"], what["slot"])
            return
        until = self.after("answer_window")
        heard: Any = {**case, "present": True, "until": until}
        self.put_slot(what["job"], what["slot"], case=heard)
        self.set(until, "case", what["job"], what["slot"])

    def witness(self, signer: bytes, what: Record, _: bytes) -> None:
        """CASE-5."""
        job_id, slot = what["job"], what["slot"]
        job = self.known(b"j" + job_id)
        rule(job["status"] == "active" and slot in self.job_slots(job), "CASE-5")
        state, standby = self.slot(job_id, slot), job["standby"]
        rule(what["epoch"] == job["epoch"], "CASE-5")
        rule(what["incarnation"] == state["incarnation"], "CASE-5")
        case = state["case"]
        rule(case is not None and case["opened"] == what["opened"] and case["present"], "CASE-5")
        rule(standby is not None and standby["session"] != b"", "CASE-5")
        rule(standby["node"] == signer, "CASE-5")
        if not what["delivered"]:
            self.vacate(job_id, slot, "undelivered", standby["owner"])
            return
        self.end_case(job_id, slot)
        found = [*state["delivered"], case["accuser"]]
        self.put_slot(job_id, slot, delivered=found)
        if found.count(case["accuser"]) == OF_PAIR:
            self.vacate(job_id, slot, "separated")

    def case_over(self, job_id: bytes, slot: int, _: int) -> None:
        """CASE-6."""
        if self.slot(job_id, slot)["case"]["present"]:
            self.end_case(job_id, slot)
        else:
            self.vacate(job_id, slot, "absent")

    def window_over(self, job_id: bytes, slot: int, _: int) -> None:
        """JOB-5."""
        job, window = self.the_job(job_id), self.rules["segment_window"]
        states = {one: self.slot(job_id, one) for one in self.living(job)}
        heights = [state["committed"] for state in states.values()]
        mine = states[slot]["committed"]
        if (
            self.waits(job_id)
            or any(state["case"] is not None for state in states.values())
            or any(state["worker"]["session"] == b"" for state in states.values())
            or min(heights) < mine
            or self.room(job, slot) <= mine
        ):
            self.set(self.height + window, "stall", job_id, slot)
            return
        slow = [slot]
        if min(heights) == max(heights):
            last = max(state["last_commit"] for state in states.values())
            quiet = max(job["active"], job["repaired"], last) + 2 * window
            if self.height < quiet:
                self.set(quiet, "stall", job_id, slot)
                return
            slow = self.holding_up(job)
        if not slow or len(slow) == len(states):
            text = f"slot {slot} did not commit segment {mine} within {window} blocks"
            self.refund(job_id, "fault", text)
            return
        for one in slow:
            job = self.the_job(job_id)
            if job["status"] == "active" and one in self.living(job):
                self.vacate(job_id, one, "stall")
