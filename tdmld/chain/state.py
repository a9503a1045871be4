"""The ledger's state as rules and readers see it: typed records over a key-value store.

`State(get)` reads through `get` (finalized values, bytes) and keeps what was put until the caller
takes `changes`. Nothing is written anywhere by this class. `fork` gives a scratch copy whose
effects are kept (`merge`) or dropped, so that a failing transaction leaves no trace.

Every put of an account or a job also moves the difference into `supply`, so the sum over all places
of money is known after every change without counting; `ledger.recount` counts.

Keys: one letter, then fixed-width fields (integers big-endian):

    a owner            Account        s job slot           SlotState    d height      DueList
    f owner            Facts          g job slot segment   Segment      D, D bucket   Heights
    n node             Node           u job slot segment   Audit        t due entry   At
    k node             StandingAsk    p job owner          Earnings     i name byte   Keys (index)
    j job              Job            P job                Keys         S             Supply
    b owner            Unbondings     v epoch              ValidatorSet   L             Head
    w owner            Nominee        e epoch              EpochStart
    m epoch                Absences   x owner node epoch   Offence      T             At
    r job round            Round
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from msgspec.structs import replace

from tdmld.chain.accounts import (
    Absences,
    Account,
    EpochStart,
    Facts,
    Nominee,
    Offence,
    Supply,
    Unbondings,
    ValidatorSet,
)
from tdmld.chain.codec import Record, decode, encode
from tdmld.chain.limits import RECORD_BYTES
from tdmld.chain.records import (
    At,
    Audit,
    Earnings,
    Head,
    Job,
    Keys,
    Node,
    Round,
    Segment,
    SlotState,
    StandingAsk,
)

R = TypeVar("R", bound=Record)

SUPPLY_KEY = b"S"
_HEAD_KEY = b"L"
_TAINTED_KEY = b"T"
_ASKS = b"k"
_ACTIVE_JOBS = b"j"
_NOMINEES = b"w"


def owners_of(keys: Iterable[bytes]) -> Iterator[bytes]:
    """The owners whose accounts stand under these raw keys."""
    return (key[1:] for key in keys if key[:1] == b"a")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


class State:
    """Finalized state, or a scratch copy of it in the middle of a block. Reading changes nothing.

    Raises DecodeError when a stored record is corrupt.
    """

    __slots__ = ("_base", "_changed", "_get", "_known")

    def __init__(self, get: Callable[[bytes], bytes | None]) -> None:
        self._get = get
        self._base: State | None = None
        self._known: dict[bytes, Record | None] = {}
        self._changed: set[bytes] = set()

    def fork(self) -> "State":
        """A scratch copy that reads through this one. One fork at a time may be merged back."""
        child = State(self._get)
        child._base = self
        return child

    def merge(self, child: "State") -> None:
        """Take over everything that was put into `child`, a fork of this state."""
        if child._base is not self:
            raise ValueError("not a fork of this state")
        for key in child._changed:
            self._known[key] = child._known[key]
        self._changed |= child._changed

    @property
    def changes(self) -> dict[bytes, bytes | None]:
        """What was put since the start, encoded, by ascending key; None: deleted."""
        return {
            key: None if (record := self._known[key]) is None else encode(record)
            for key in sorted(self._changed)
        }

    def read(self, kind: type[R], key: bytes) -> R | None:
        """The record under a raw key, or None. `kind` is what that key's letter says."""
        if key not in self._known:
            if self._base is not None:
                return self._base.read(kind, key)
            raw = self._get(key)
            self._known[key] = None if raw is None else decode(kind, raw, RECORD_BYTES)
        return self._known[key]  # type: ignore[return-value]  # the letter fixes the kind

    def write(self, key: bytes, record: Record | None) -> None:
        """Put a record under a raw key; None deletes."""
        self._known[key] = record
        self._changed.add(key)

    # -- money and identities

    @property
    def supply(self) -> Supply:
        return self.read(Supply, SUPPLY_KEY) or Supply(0, 0, 0, 0, 0, 0)

    def account(self, owner: bytes) -> Account:
        """An owner's account; all zeros when it was never used."""
        return self.read(Account, b"a" + owner) or Account()

    def put_account(self, owner: bytes, account: Account) -> None:
        old, supply = self.account(owner), self.supply
        stakes = account.vote_stake + account.work_stake - old.vote_stake - old.work_stake
        self.write(
            SUPPLY_KEY,
            replace(
                supply,
                balances=supply.balances + account.balance - old.balance,
                stakes=supply.stakes + stakes,
            ),
        )
        self.write(b"a" + owner, account)

    def burn(self, amount: int) -> None:
        """Count `amount`, which the caller took out of an account or a job, as destroyed."""
        self.write(SUPPLY_KEY, replace(self.supply, burned=self.supply.burned + amount))

    def facts(self, owner: bytes) -> Facts:
        """What an owner's nodes have done; zeros for a newcomer."""
        return self.read(Facts, b"f" + owner) or Facts()

    def put_facts(self, owner: bytes, facts: Facts) -> None:
        self.write(b"f" + owner, facts)

    def node(self, node: bytes) -> Node | None:
        """A registered node key."""
        return self.read(Node, b"n" + node)

    def put_node(self, node: bytes, record: Node) -> None:
        self.write(b"n" + node, record)

    def owner_of(self, node: bytes) -> bytes | None:
        """The owner that a node key is bound to."""
        record = self.node(node)
        return None if record is None else record.owner

    def ask(self, node: bytes) -> StandingAsk | None:
        """A node's latest ask; it is in force up to and including its `until_height`."""
        return self.read(StandingAsk, b"k" + node)

    def put_ask(self, node: bytes, ask: StandingAsk | None) -> None:
        self.write(b"k" + node, ask)
        self._index(_ASKS, node, ask is not None)

    def asks(self) -> Iterator[tuple[bytes, StandingAsk]]:
        """(node, ask) by ascending node key, also those that are over."""
        for node in self._indexed(_ASKS):
            ask = self.ask(node)
            if ask is not None:
                yield node, ask

    # -- validators

    def unbondings(self, owner: bytes) -> Unbondings:
        """An owner's stake on its way back."""
        return self.read(Unbondings, b"b" + owner) or Unbondings()

    def put_unbondings(self, owner: bytes, unbondings: Unbondings) -> None:
        supply = self.supply
        moved = unbondings.total - self.unbondings(owner).total
        self.write(SUPPLY_KEY, replace(supply, unbonding=supply.unbonding + moved))
        self.write(b"b" + owner, unbondings if unbondings.entries else None)

    def nominee(self, owner: bytes) -> bytes | None:
        """The node that votes for an owner, whether or not it is elected."""
        record = self.read(Nominee, b"w" + owner)
        return None if record is None else record.node

    def put_nominee(self, owner: bytes, node: bytes | None) -> None:
        self.write(b"w" + owner, None if node is None else Nominee(node))
        self._index(_NOMINEES, owner, node is not None)

    def nominees(self) -> Iterator[tuple[bytes, bytes]]:
        """(owner, node) by ascending owner key."""
        for owner in self._indexed(_NOMINEES):
            node = self.nominee(owner)
            if node is not None:
                yield owner, node

    def validator_set(self, epoch: int) -> ValidatorSet | None:
        """The validators of an epoch, from the last block of the epoch before the last one on."""
        return self.read(ValidatorSet, b"v" + u64(epoch))

    def put_validator_set(self, chosen: ValidatorSet) -> None:
        self.write(b"v" + u64(chosen.epoch), chosen)

    def epoch_start(self, epoch: int) -> EpochStart | None:
        """When an epoch began; None before its predecessor's last block was executed."""
        return self.read(EpochStart, b"e" + u64(epoch))

    def put_epoch_start(self, epoch: int, start: EpochStart) -> None:
        self.write(b"e" + u64(epoch), start)

    def absences(self, epoch: int) -> Absences | None:
        """Missed turns to lead of an epoch that is not over; None when there are none."""
        return self.read(Absences, b"m" + u64(epoch))

    def put_absences(self, epoch: int, absences: Absences | None) -> None:
        self.write(b"m" + u64(epoch), absences)

    @property
    def last_tainted(self) -> int:
        """The last tainted height (BEACON-6); 0 when there was none."""
        record = self.read(At, _TAINTED_KEY)
        return 0 if record is None else record.height

    def put_last_tainted(self, height: int) -> None:
        self.write(_TAINTED_KEY, At(height))

    def offence(self, owner: bytes, node: bytes, epoch: int) -> Offence | None:
        """What was proven against an owner's node in an epoch."""
        return self.read(Offence, b"x" + owner + node + u64(epoch))

    def put_offence(self, owner: bytes, epoch: int, offence: Offence) -> None:
        self.write(b"x" + owner + offence.node + u64(epoch), offence)

    # -- jobs

    def job(self, job: bytes) -> Job | None:
        return self.read(Job, b"j" + job)

    def put_job(self, job: Job) -> None:
        old = self.job(job.id)
        if old is None or old.locked != job.locked:
            supply = self.supply
            locked = supply.escrows + job.locked - (0 if old is None else old.locked)
            self.write(SUPPLY_KEY, replace(supply, escrows=locked))
        if old is None:
            self._index(_ACTIVE_JOBS, job.id, True)
        elif job.final and not old.final:
            self._index(_ACTIVE_JOBS, job.id, False)
            head = self.read(Head, _HEAD_KEY)
            job = replace(job, previous_closed=b"" if head is None else head.job)
            self.write(_HEAD_KEY, Head(job.id))
        self.write(b"j" + job.id, job)

    def active_jobs(self) -> tuple[bytes, ...]:
        """Ids of the jobs that are not final, ascending."""
        return tuple(self._indexed(_ACTIVE_JOBS))

    def final_jobs(self) -> Iterator[Job]:
        """Closed, refunded and expired jobs, newest first."""
        head = self.read(Head, _HEAD_KEY)
        next_id = b"" if head is None else head.job
        while next_id:
            job = self.job(next_id)
            if job is None:
                return
            yield job
            next_id = job.previous_closed

    def slot(self, job: bytes, slot: int) -> SlotState | None:
        """A slot of a job that is or was matched."""
        return self.read(SlotState, b"s" + job + u32(slot))

    def put_slot(self, job: bytes, slot: int, state: SlotState | None) -> None:
        self.write(b"s" + job + u32(slot), state)

    def segment(self, job: bytes, slot: int, segment: int) -> Segment | None:
        return self.read(Segment, b"g" + job + u32(slot) + u64(segment))

    def put_segment(self, job: bytes, slot: int, segment: int, record: Segment | None) -> None:
        self.write(b"g" + job + u32(slot) + u64(segment), record)

    def round(self, job: bytes, number: int) -> Round | None:
        """The contributions of a round, from the first attestation or readiness on."""
        return self.read(Round, b"r" + job + u64(number))

    def put_round(self, job: bytes, number: int, record: Round | None) -> None:
        self.write(b"r" + job + u64(number), record)

    def audit(self, job: bytes, slot: int, segment: int) -> Audit | None:
        return self.read(Audit, b"u" + job + u32(slot) + u64(segment))

    def put_audit(self, job: bytes, slot: int, segment: int, audit: Audit | None) -> None:
        self.write(b"u" + job + u32(slot) + u64(segment), audit)

    def earnings(self, job: bytes, owner: bytes) -> Earnings:
        """What `owner` was paid for `job`, by role."""
        return self.read(Earnings, b"p" + job + owner) or Earnings()

    def put_earnings(self, job: bytes, owner: bytes, earnings: Earnings) -> None:
        payees = self.read(Keys, b"P" + job) or Keys()
        added = _with(payees.keys, owner)
        if added is not payees.keys:
            self.write(b"P" + job, Keys(added))
        self.write(b"p" + job + owner, earnings)

    def payments(self, job: bytes) -> dict[bytes, Earnings]:
        """Everybody who was paid for `job`, by ascending owner key."""
        payees = self.read(Keys, b"P" + job) or Keys()
        return {owner: self.earnings(job, owner) for owner in payees.keys}

    # -- indexes: sorted sets of keys, in 256 buckets so that one addition rewrites little

    def _index(self, name: bytes, key: bytes, present: bool) -> None:
        place = b"i" + name + key[:1]
        bucket = (self.read(Keys, place) or Keys()).keys
        changed = _with(bucket, key) if present else tuple(k for k in bucket if k != key)
        if changed != bucket:
            self.write(place, Keys(changed) if changed else None)

    def _indexed(self, name: bytes) -> Iterator[bytes]:
        for first in range(256):
            bucket = self.read(Keys, b"i" + name + bytes([first]))
            if bucket is not None:
                yield from bucket.keys


def _with(keys: tuple[bytes, ...], key: bytes) -> tuple[bytes, ...]:
    """Sorted `keys` with `key` in it; the same object when it was there."""
    place = bisect_left(keys, key)
    if place < len(keys) and keys[place] == key:
        return keys
    return (*keys[:place], key, *keys[place:])
