"""The second ledger's section 11: asks, offers, matching."""

from typing import Any

from tests.chain.second.formats import ZERO, H, signed, u32, u64
from tests.chain.second.records import AHEAD, FIELDS, MILLION, Record, ceil, named, rule
from tests.chain.second.work import Work

STANDBY = 0xFFFF_FFFF
TRIES = 4


class Market(Work):
    """Who works for whom, and for how much."""

    # -- 11: market

    def ask(self, signer: bytes, what: Record, _: bytes) -> None:
        rule(self.known(b"n" + signer)["from_height"] <= self.height, "ASK-1")
        old = self.db.get(b"k" + signer)
        rule(old is None or what["until_height"] > old["until_height"], "ASK-2")
        rule(old is None or self.may_ask_again(old), "ASK-5")
        last = self.height + 2 * self.rules["epoch_blocks"]
        rule(self.height <= what["until_height"] <= last, "ASK-2")
        rule(what["class_id"] not in ("", "any"), "ASK-3")
        rule(what["price"] <= 1 << 53 and what["memory"] <= 1 << 50, "ASK-3")
        rule(what["audit_capacity"] <= 1024, "ASK-3")
        opened, paths = self.receipts(signer, what)
        kept = {name: value for name, value in what.items() if name != "receipts"}
        self.put(b"k" + signer, {**kept, "open": opened, "paths": paths}, height=self.height)
        self.index(b"k", signer, True)

    def receipts(self, signer: bytes, what: Record) -> tuple[int, list[bytes]]:
        """ASK-6, ASK-7."""
        rows = [named("witness kind height signature", row) or {} for row in what["receipts"]]
        order = [(row["kind"], row["witness"]) for row in rows]
        rule(len(rows) <= 8 and order == sorted(set(order)), "ASK-6")
        mine = self.known(b"n" + signer)["owner"]
        for row in rows:
            witness = self.known(b"n" + row["witness"])
            rule(row["kind"] in (1, 2) and witness["owner"] != mine, "ASK-6")
            rule(witness["from_height"] <= self.height and not witness["revoked"], "ASK-6")
            oldest = self.height - self.rules["epoch_blocks"]
            rule(oldest <= row["height"] <= self.height, "ASK-6")
            message = signer + what["session"] + bytes([row["kind"]]) + u64(row["height"])
            good = signed(row["witness"], "dial", self.chain, message, row["signature"])
            rule(good, "ASK-6")
        dialled = {self.known(b"n" + row["witness"])["owner"] for row in rows if row["kind"] == 1}
        return len(dialled), [row["witness"] for row in rows if row["kind"] == 2]

    def may_ask_again(self, old: Record) -> bool:
        """ASK-5."""
        return self.height >= int(old["height"]) + ceil(self.rules["epoch_blocks"], 8)

    def offer(self, signer: bytes, what: Record, job_id: bytes) -> None:
        stages = [named("parameters memory", row) or {} for row in what["stages"]]
        slots = what["lanes"] * len(stages)
        for value, most in (
            (what["spec_bytes"], 65_536), (len(stages), 64), (what["lanes"], 16), (slots, 256),
            *((weight, 64) for weight in what["lane_weights"]),
            (what["rounds"], 1 << 20), (what["segment_steps"], 1 << 20), (what["unsettled"], 64),
            (what["state_every"], 64), (what["tokens"], 1 << 40),
            *((stage["parameters"], 1 << 44) for stage in stages),
            *((stage["memory"], 1 << 50) for stage in stages),
        ):  # fmt: skip
            rule(1 <= value <= most, "OFFER-1")
        rule(2 * what["state_every"] <= what["unsettled"], "OFFER-1")
        own = int(what["privacy"] == "split")
        rule(what["class_id"] != "", "OFFER-1")
        rule(own or what["privacy"] in ("open", "sealed"), "OFFER-1")
        mode = what["lane_mode"]
        rule((mode == "single") == (what["lanes"] == 1), "OFFER-7")
        rule(mode in ("single", "sync", "diloco"), "OFFER-7")
        rule(len(what["lane_weights"]) == what["lanes"], "OFFER-7")
        rule(not what["ring"] or len(stages) > 1, "OFFER-7")
        rule(not own or (what["ring"] and what["lanes"] == 1), "OFFER-7")
        rule(mode != "diloco" or what["rounds"] > 1, "OFFER-7")
        weights = sum(what["lane_weights"]) * len(stages) - own
        rule(max(what["slot_price_max"], what["standby_price"]) <= 1 << 53, "OFFER-1")
        rate, price, budget = what["audit_rate"], what["audit_price"], what["audit_budget"]
        rule(rate <= MILLION, "OFFER-1")
        rule(price > 0 or rate == budget == 0, "OFFER-2")
        rule(budget >= ceil(rate * weights * what["rounds"], MILLION) * price, "OFFER-2")
        rule(self.height < what["deadline"] <= self.height + AHEAD, "OFFER-3")
        rule(b"n" + what["source"] in self.db, "OFFER-3")
        segments = slots * what["rounds"]
        most = (
            4 * (slots + 1)
            + 2 * slots
            + segments
            + 2 * slots * ceil(what["rounds"], what["state_every"])
            + (segments if rate else 0) * (self.rules["audit_redraws"] + 3)
            + 2
            + (segments - slots) * (what["lanes"] - 1) * (mode == "diloco")
            + self.repairs(what, slots)
        )
        locked = {
            "escrow": what["rounds"]
            * (weights * what["slot_price_max"] + slots * what["standby_price"]),
            "audit_budget": budget,
            "fee_budget": self.rules["tx_fee"] * most,
            "deposit": self.rules["offer_deposit"],
        }
        rule(sum(locked.values()) <= self.account(signer)["balance"], "OFFER-4")
        self.move(signer, -sum(locked.values()))
        empty = dict.fromkeys(("reason", "detail", "class_id"), "")
        nothing = dict.fromkeys(("result", "previous_closed"), b"")
        lists: Record = {name: [] for name in ("declined", "results", "excluded", "lost_lanes")}
        fresh: Record = {**empty, **nothing, **lists, "standby": None}
        job = {
            **dict.fromkeys(FIELDS["j"].split(), 0), **what, **locked, **fresh, "stages": stages,
            "id": job_id, "submitter": signer, "source_session": what["session"],
            "class_wanted": what["class_id"], "class_id": "", "offered": self.height,
            "status": "offered",
        }  # fmt: skip
        self.db[b"j" + job_id] = {name: job[name] for name in FIELDS["j"].split()}
        self.index(b"j", job_id, True)
        self.set(self.after("match_delay"), "match", job_id)
        self.set(what["deadline"], "deadline", job_id)

    def repairs(self, what: Record, slots: int) -> int:
        """OFFER-6."""
        audits = self.rules["audit_redraws"] + 3 if what["audit_rate"] else 0
        attested = 2 * (what["lanes"] - 1) if what["lane_mode"] == "diloco" else 0
        redone = slots * what["unsettled"] * (20 + 8)
        return int(redone * (3 + audits + attested) + 2 * slots * 20 + 3 * slots * 32 + 33)

    def asks(self) -> list[tuple[bytes, Record]]:
        return sorted((key[1:], ask) for key, ask in self.db.items() if key[:1] == b"k")

    def match(self, job_id: bytes, *_: int) -> None:
        """MATCH-2, MATCH-5, MATCH-6."""
        job = self.db[b"j" + job_id]
        cost = min(job["deposit"], ceil(self.rules["offer_deposit"], 10))
        self.put_job(job_id, deposit=job["deposit"] - cost)
        self.burn(cost)
        job = self.db[b"j" + job_id]
        candidates = self.candidates(job)
        classes = {ask["class_id"] for _, ask, _ in candidates}
        if job["class_wanted"] != "any":
            classes = {job["class_wanted"]}
        casts = []
        for class_id in sorted(classes):
            found = self.cast(job, [row for row in candidates if row[1]["class_id"] == class_id])
            if found is not None:
                casts.append((sum(m["price"] for m in found[0]), class_id, found))
        if not casts:
            text = "no set of asks in force fits the offer's class, memory and prices"
            self.end(job_id, "expired", "no_match", text)
            return
        _, class_id, (workers, standby) = min(casts, key=lambda row: row[:2])
        for slot, worker in enumerate(workers):
            self.db[b"s" + job_id + u32(slot)] = {
                **dict.fromkeys(FIELDS["s"].split(), 0), "worker": worker,
                "incarnation": job["attempt"], "attested": [], "genesis": None, "barred": b"",
                "case": None, "delivered": [], "former": [],
            }  # fmt: skip
        now = {"matched": self.height, "standby_turn": job["attempt"]}
        self.put_job(job_id, status="matched", class_id=class_id, standby=standby, **now)
        self.capacity(job_id, 1)
        self.set(self.after("accept_window"), "accept", job_id)

    def candidates(self, job: Record) -> list[Any]:
        """MATCH-2."""
        party = {job["submitter"], self.db[b"n" + job["source"]]["owner"]}
        candidates = []
        for node, ask in sorted(self.asks(), key=lambda row: row[0]):
            record = self.db[b"n" + node]
            if ask["until_height"] < self.height:
                if self.may_ask_again(ask):
                    del self.db[b"k" + node]
                    self.index(b"k", node, False)
            elif (
                (record["owner"] not in party or (node == job["source"] and self.is_own(job, 0)))
                and node not in job["declined"]
                and record["owner"] not in job["excluded"]
                and record["from_height"] <= self.height
            ):
                candidates.append((node, ask, record))
        return candidates

    def cast(self, job: Record, rows: list[Any]) -> tuple[list[Record], Record] | None:
        """MATCH-1, MATCH-3, MATCH-4."""
        workers: list[Record] = []
        chosen: list[tuple[bytes, Record]] = []

        for slot in self.job_slots(job):
            stage = job["stages"][slot % len(job["stages"])]
            lane = workers[slot - slot % len(job["stages"]) :]
            ends = [chosen[end] for end in self.neighbours(job, slot) if end < slot]
            best = None
            for node, ask, record in rows:
                price = self.price(job, slot, ask)
                if (
                    node in [w["node"] for w in workers]
                    or record["owner"] in [w["owner"] for w in lane]
                    or ask["memory"] - record["memory_used"] < stage["memory"]
                    or price > job["slot_price_max"] * self.times(job, slot)
                    or (node == job["source"]) is not self.is_own(job, slot)
                    or not all(self.path(end, (node, ask)) for end in ends)
                ):
                    continue
                order = price * self.weight(record["owner"]), self.lot(job, node, slot)
                if best is None or order < best[0]:
                    best = order, member(node, record["owner"], price), (node, ask)
            if best is None:
                return None
            workers.append(best[1])
            chosen.append(best[2])
        owners = {worker["owner"] for worker in workers}
        standby = self.cast_standby(job, rows, owners)
        return None if standby is None else (workers, standby)

    def price(self, job: Record, slot: int, ask: Record) -> int:
        """MATCH-1."""
        parameters = job["stages"][slot % len(job["stages"])]["parameters"]
        price = ceil(ask["price"] * parameters * job["tokens"], 10**9)
        return 0 if self.is_own(job, slot) else price * self.times(job, slot)

    def lot(self, job: Record, node: bytes, slot: int) -> bytes:
        return H(self.mix, job["id"], u32(slot), node)

    def cast_standby(self, job: Record, rows: list[Any], owners: set[bytes]) -> Record | None:
        """MATCH-4."""
        helpers = [
            (
                ask["price"] * self.weight(record["owner"]),
                self.lot(job, node, STANDBY),
                member(node, record["owner"], job["standby_price"]),
            )
            for node, ask, record in rows
            if record["owner"] not in owners
            and ask["standby_slots"] - record["standby_used"] >= len(self.job_slots(job))
        ]
        return min(helpers, key=lambda row: row[:2])[2] if helpers else None

    def path(self, a: tuple[bytes, Record], b: tuple[bytes, Record]) -> bool:
        """MATCH-3: between (node, ask) and (node, ask)."""
        opened = max(a[1]["open"], b[1]["open"]) >= self.rules["dial_receipts"]
        return bool(opened or b[0] in a[1]["paths"] or a[0] in b[1]["paths"])

    def weight(self, owner: bytes) -> int:
        """REP-1."""
        facts = self.zeros(b"f" + owner)
        experience = facts["segments"] + facts["audits"] + facts["proofs"]
        earned = 100_000 + 900_000 * experience // (experience + 100)
        return 2 * MILLION - int(earned) * 10 // (10 + facts["faults"] + 10 * facts["mismatches"])

    def asked(self, signer: bytes, what: Record) -> Record:
        """MATCH-7."""
        job = self.known(b"j" + what["job"])
        rule(job["status"] == "matched" and what["attempt"] == job["attempt"], "MATCH-7")
        place = job["standby"]
        if what["slot"] != STANDBY:
            rule(what["slot"] in self.job_slots(job), "MATCH-7")
            place = self.slot(what["job"], what["slot"])["worker"]
        rule(place["node"] == signer and place["session"] == b"", "MATCH-7")
        return dict(place)

    def silent(self, job_id: bytes) -> list[Record]:
        job = self.db[b"j" + job_id]
        members = [self.slot(job_id, slot)["worker"] for slot in self.job_slots(job)]
        return [one for one in [*members, job["standby"]] if one["session"] == b""]

    def accept(self, signer: bytes, what: Record, _: bytes) -> None:
        place = {**self.asked(signer, what), "session": what["session"]}
        rule(what["session"] != ZERO, "MATCH-7")
        if what["slot"] == STANDBY:
            self.put_job(what["job"], standby=place)
        else:
            self.put_slot(what["job"], what["slot"], worker=place, since=self.height)
        if not self.silent(what["job"]):
            self.put_job(what["job"], status="preparing")
            self.cancel("accept", what["job"])
            self.set(self.after("activate_window"), "activate", what["job"])

    def decline(self, signer: bytes, what: Record, _: bytes) -> None:
        self.asked(signer, what)
        self.again(what["job"], [signer])

    def accept_over(self, job_id: bytes, *_: int) -> None:
        """MATCH-8."""
        silent = self.silent(job_id)
        for one in silent:
            self.count(one["owner"], "faults")
        self.again(job_id, [one["node"] for one in silent])

    def again(self, job_id: bytes, without: list[bytes]) -> None:
        """MATCH-9."""
        job = self.db[b"j" + job_id]
        if job["attempt"] + 1 == TRIES:
            text = f"matched {TRIES} times, and never accepted by all"
            self.end(job_id, "expired", "declined", text)
            return
        self.capacity(job_id, -1)
        for slot in self.job_slots(job):
            del self.db[b"s" + job_id + u32(slot)]
        declined = sorted({*job["declined"], *without})
        changes = {"standby": None, "class_id": "", "attempt": job["attempt"] + 1}
        self.put_job(job_id, status="offered", declined=declined, **changes)
        self.cancel("accept", job_id)
        self.set(self.after("match_delay"), "match", job_id)


def member(node: bytes, owner: bytes, price: int) -> Record:
    return {"node": node, "owner": owner, "price": price, "session": b""}
