"""A second ledger, written from docs/spec/chain.md alone: records, state, due entries (2, 5, 10).

Plain and slow on purpose; it shares no code with the node. Integers have any size; a record is a
dict by its fields' names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from tests.chain.second.committees import tainted
from tests.chain.second.formats import key_of, pack, u32, u64, unpack

Record = dict[str, Any]
MILLION = 1_000_000
BUCKET = 1024
AHEAD = 1 << 20
"""DEADLINE_BLOCKS"""

MEMBER, ROOTS = "node owner price session", "node shared lane data"
CASE = "accuser link seq opened until present"
FORMER = "node owner cause epoch incarnation settled height"
FIELDS = {
    "a": "balance nonce vote_stake work_stake",
    "f": "segments audits proofs faults mismatches earned",
    "n": "owner from_height memory_used standby_used audits_open revoked convicted jailed",
    "k": "session class_id memory price audit_capacity standby_slots until_height open paths "
    "height",
    "j": "id submitter source source_session spec_id spec_bytes stages lanes ring lane_mode "
    "lane_weights rounds segment_steps unsettled state_every tokens class_wanted privacy "
    "slot_price_max standby_price audit_rate "
    "audit_price deadline escrow audit_budget fee_budget deposit offered status reason detail "
    "class_id attempt declined standby epoch audits_reserved matched active finished closed "
    "results result previous_closed excluded standby_turn standby_since repaired lost_lanes",
    "s": "worker incarnation attested genesis committed settled last_commit held since unproven "
    "barred case stalls delivered former",
    "g": "worker epoch incarnation start_shared start_lane end_shared end_lane links seal loss "
    "contribution committed forced status linked note proof proof_key proof_until standby_hash "
    "worker_hash settled holder",
    "r": "attested ready decided included contributions",
    "u": "auditor owner session drawn until attempt tried status missing hash salt steps "
    "worker_list auditor_list paid",
    "p": "worker standby auditor",
    "P": "keys",
    "b": "entries",
    "w": "node",
    "v": "epoch seats",
    "e": "height time_ms",
    "x": "node height burned",
    "m": "missed",
    "i": "keys",
    "d": "entries",
    "D": "heights",
    "t": "height",
    "T": "height",
    "S": "genesis balances stakes unbonding escrows burned",
    "L": "job",
}
NESTED: dict[tuple[str, str], str] = {
    ("j", "standby"): MEMBER,
    ("s", "worker"): MEMBER,
    ("s", "genesis"): ROOTS,
    ("s", "case"): CASE,
}
LISTS: dict[tuple[str, str], str] = {
    ("j", "stages"): "parameters memory",
    ("s", "attested"): ROOTS,
    ("s", "former"): FORMER,
    ("g", "links"): "link sent received",
    ("b", "entries"): "bucket amount epoch",
    ("v", "seats"): "node owner weight leads",
}


@dataclass(frozen=True)
class Place:
    """What a block's rules may depend on, besides state and genesis (EXEC-2). `mix`: after it."""

    height: int
    view: int
    parent_view: int
    time_ms: int
    mix: bytes


class Broken(Exception):
    """A transaction breaks a rule."""


def rule(holds: bool, name: str) -> None:
    if not holds:
        raise Broken(name)


def B(*parts: bytes) -> bytes:
    return blake3(b"".join(parts)).digest()


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def named(names: str, values: list[Any] | None) -> Record | None:
    return None if values is None else dict(zip(names.split(), values, strict=True))


def listed(record: Record | None) -> list[Any] | None:
    return None if record is None else list(record.values())


def decoded(letter: str, raw: bytes) -> Record:
    record = named(FIELDS[letter], unpack(raw))
    assert record is not None
    for name in record:
        if (letter, name) in NESTED:
            record[name] = named(NESTED[letter, name], record[name])
        elif (letter, name) in LISTS:
            record[name] = [named(LISTS[letter, name], row) for row in record[name]]
    return record


def encoded(letter: str, record: Record) -> bytes:
    values = []
    for name in FIELDS[letter].split():
        value = record[name]
        if (letter, name) in NESTED:
            value = listed(value)
        elif (letter, name) in LISTS:
            value = [listed(row) for row in value]
        values.append(value)
    return pack(values)


def held(job: Record) -> int:
    """STATE-4."""
    return int(job["escrow"] + job["audit_budget"] + job["fee_budget"] + job["deposit"])


class Ledger:
    """A state and what blocks make of it. `document`: the canonical genesis."""

    def __init__(
        self, document: dict[str, Any], chain: bytes, state: Mapping[bytes, bytes]
    ) -> None:
        self.rules: dict[str, Any] = document["parameters"]
        self.auditors = {key_of(owner) for owner in document["auditors"]}
        self.chain = chain
        self.db = {key: decoded(chr(key[0]), raw) for key, raw in state.items()}
        self.at = Place(0, 0, 0, 0, b"")

    @property
    def height(self) -> int:
        return self.at.height

    @property
    def mix(self) -> bytes:
        return self.at.mix

    @property
    def tainted(self) -> bool:
        return tainted(self.at.parent_view, self.at.view)

    @property
    def state(self) -> dict[bytes, bytes]:
        return {key: encoded(chr(key[0]), record) for key, record in self.db.items()}

    def sum(self) -> None:
        """STATE-5."""
        accounts = [record for key, record in self.db.items() if key[:1] == b"a"]
        supply = self.db[b"S"]
        sums = {
            "balances": sum(account["balance"] for account in accounts),
            "stakes": sum(a["vote_stake"] + a["work_stake"] for a in accounts),
            "unbonding": sum(
                entry["amount"]
                for key, record in self.db.items()
                if key[:1] == b"b"
                for entry in record["entries"]
            ),
            "escrows": sum(held(job) for key, job in self.db.items() if key[:1] == b"j"),
        }
        self.db[b"S"] = {**supply, **sums}
        assert sum(sums.values()) + supply["burned"] == supply["genesis"]

    # -- 5: records

    def put(self, key: bytes, record: Record, **changes: Any) -> None:
        self.db[key] = {**record, **changes}

    def known(self, key: bytes) -> Record:
        rule(key in self.db, "not known")
        return self.db[key]

    def zeros(self, key: bytes) -> Record:
        """STATE-1."""
        return self.db.get(key) or dict.fromkeys(FIELDS[chr(key[0])].split(), 0)

    def account(self, owner: bytes) -> Record:
        return self.zeros(b"a" + owner)

    def move(self, owner: bytes, amount: int) -> None:
        account = self.account(owner)
        self.put(b"a" + owner, account, balance=account["balance"] + amount)

    def count(self, owner: bytes, name: str, more: int = 1) -> None:
        """REP-2."""
        facts = self.zeros(b"f" + owner)
        self.put(b"f" + owner, facts, **{name: min(facts[name] + more, 2**63 - 1)})

    def index(self, name: bytes, key: bytes, present: bool) -> None:
        """STATE-2."""
        place = b"i" + name + key[:1]
        keys = set(self.db.get(place, {"keys": []})["keys"]) - {key} | ({key} if present else set())
        self.db.pop(place, None)
        if keys:
            self.db[place] = {"keys": sorted(keys)}

    def job_slots(self, job: Record) -> range:
        return range(job["lanes"] * len(job["stages"]))

    def slot(self, job_id: bytes, slot: int) -> Record:
        return self.known(b"s" + job_id + u32(slot))

    def put_slot(self, job_id: bytes, slot: int, **changes: Any) -> None:
        self.put(b"s" + job_id + u32(slot), self.slot(job_id, slot), **changes)

    def put_job(self, job_id: bytes, **changes: Any) -> None:
        self.put(b"j" + job_id, self.db[b"j" + job_id], **changes)

    def living(self, job: Record) -> list[int]:
        """Slots of the lanes that are not lost."""
        stages = len(job["stages"])
        return [slot for slot in self.job_slots(job) if slot // stages not in job["lost_lanes"]]

    def capacity(self, job_id: bytes, sign: int) -> None:
        """MATCH-6, and back."""
        job = self.db[b"j" + job_id]
        for slot in self.living(job):
            self.use_slot(job, slot, self.slot(job_id, slot)["worker"]["node"], sign)
        if job["standby"] is not None:
            self.use_standby(job, job["standby"]["node"], sign)

    def use_slot(self, job: Record, slot: int, node: bytes, sign: int) -> None:
        memory = job["stages"][slot % len(job["stages"])]["memory"]
        self.use(node, "memory_used", sign * memory)

    def use_standby(self, job: Record, node: bytes, sign: int) -> None:
        self.use(node, "standby_used", sign * len(self.job_slots(job)))

    def use(self, node: bytes, name: str, more: int) -> None:
        record = self.db[b"n" + node]
        assert record[name] + more >= 0
        self.put(b"n" + node, record, **{name: record[name] + more})

    # -- 10: due entries

    def set(self, height: int, timer: str, job: bytes, slot: int = 0, segment: int = 0) -> None:
        """DUE-1, DUE-4."""
        self.cancel(timer, job, slot, segment)
        entry = [timer, job, slot, segment]
        key, bucket = b"d" + u64(height), height // BUCKET
        entries = self.db.get(key, {"entries": []})["entries"]
        self.db[key] = {"entries": [*entries, entry]}
        self.db[b"t" + pack(entry)] = {"height": height}
        for place, number in ((b"D" + u64(bucket), height), (b"D", bucket)):
            numbers = self.db.get(place, {"heights": []})["heights"]
            self.db[place] = {"heights": sorted({*numbers, number})}

    def cancel(self, timer: str, job: bytes, slot: int = 0, segment: int = 0) -> None:
        """DUE-2."""
        entry = [timer, job, slot, segment]
        at = self.db.pop(b"t" + pack(entry), None)
        if at is None:
            return
        height = at["height"]
        key, bucket = b"d" + u64(height), height // BUCKET
        left = [other for other in self.db[key]["entries"] if other != entry]
        self.db[key] = {"entries": left}
        if left:
            return
        del self.db[key]
        for place, number in ((b"D" + u64(bucket), height), (b"D", bucket)):
            numbers = [other for other in self.db[place]["heights"] if other != number]
            self.db[place] = {"heights": numbers}
            if numbers:
                return
            del self.db[place]

    def at_height(self, timer: str, job: bytes, slot: int = 0, segment: int = 0) -> int | None:
        found = self.db.get(b"t" + pack([timer, job, slot, segment]))
        return None if found is None else int(found["height"])

    def take(self) -> list[Any] | None:
        """DUE-3."""
        if b"D" not in self.db:
            return None
        bucket = self.db[b"D"]["heights"][0]
        height = self.db[b"D" + u64(bucket)]["heights"][0]
        if height > self.height:
            return None
        entry: list[Any] = self.db[b"d" + u64(height)]["entries"][0]
        self.cancel(*entry)
        return entry

    def after(self, window: str) -> int:
        return self.height + int(self.rules[window])
