"""The document that founds a chain: who owns what, who validates, and every parameter.

genesis.json is the source of truth; its canonical bytes (ASCII, keys sorted, no blanks, rows sorted
by their keys, defaults written out) hash to the chain id, so neither order nor spacing of what a
person typed matters. A TOML source of the same shape is read by `genesis_from_toml`.

Balances, vote stakes and work stakes are separate rows: an owner's stake does not come out of its
account. Together they are the supply, which stays below 2**63 for ever, for nothing mints.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from tdmld.chain.codec import Record
from tdmld.chain.crypto import address, public_key, sha256
from tdmld.chain.errors import DecodeError, GenesisError
from tdmld.chain.limits import RECEIPTS

GENESIS_BYTES_MAX = 4 << 20
VALIDATORS_MAX = 1000
"""Votes are quadratic in it."""
SUPPLY_LIMIT = 2**63

_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
"""A window in blocks, or a count that must not be zero."""
_Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
_Money = Annotated[int, msgspec.Meta(ge=0, le=SUPPLY_LIMIT - 1)]
_Stake = Annotated[int, msgspec.Meta(ge=1, le=SUPPLY_LIMIT - 1)]


class Parameters(Record, frozen=True):
    """The rules' numbers. Windows in blocks; times in milliseconds; money in smallest units."""

    interval_ms: _Milliseconds = 500
    """Least time between two blocks' headers."""
    view_timeout_ms: _Milliseconds = 2000
    leader_away_ms: _Milliseconds = 300
    """Time-out of a view whose leader is known to be unreachable."""
    heartbeat_ms: _Milliseconds = 30000
    block_bytes: Annotated[int, msgspec.Meta(ge=4096, le=16 << 20)] = 1048576
    block_transactions: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 4000
    fee_floor: _Money = 10
    tx_fee: _Money = 10
    """Burned from a job's escrow for each of its transactions."""
    due_per_block: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    epoch_blocks: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 500
    unbonding: tuple[_Count, Annotated[int, msgspec.Meta(ge=1, le=10 * 365 * 86400)]] = (1000, 3600)
    """Blocks and seconds; both must have passed."""
    validators_max: Annotated[int, msgspec.Meta(ge=1, le=VALIDATORS_MAX)] = 100
    """Owners with the most vote stake that validate; votes are quadratic in it."""
    vote_stake_min: _Stake = 1
    """Least vote stake that validates. Seats are by stake, so a network sets it higher only to keep
    empty seats from those whose absence would cost more time than their weight is worth."""
    slash_ppm: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 50_000
    """Parts per million of an owner's vote stake that a proven double vote burns. A twentieth: more
    than any one view can be worth to a single validator, and not the ruin of somebody who once
    started two machines with one key (CometBFT's networks settled there too)."""
    match_delay: _Count = 4
    accept_window: _Count = 20
    activate_window: _Count = 120
    segment_window: _Count = 60
    standby_window: _Count = 120
    draw_delay: _Count = 2
    audit_window: _Count = 60
    open_window: _Count = 12
    reveal_window: _Count = 12
    settle_window: _Count = 8
    result_window: _Count = 2000
    late_lane_percent: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 50
    """How long a round waits for lanes that are late, in parts of the last rounds' duration."""
    answer_window: _Count = 20
    """To say that one is there, when accused of a stall, and for the witness's word after that."""
    audit_redraws: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3
    offer_deposit: _Money = 10000
    dial_receipts: Annotated[int, msgspec.Meta(ge=0, le=RECEIPTS)] = 0
    """Owners who must have dialled a node before it counts as open to everybody; 0: all nodes do.
    A network behind home routers sets 2 or more: of two neighbours in a pipeline one must be open,
    or both connected directly already."""


class Validator(Record, frozen=True):
    """A row of the first validator set: keys of 32 bytes, vote stake."""

    owner: bytes
    node: bytes
    stake: int


class Genesis(Record, frozen=True):
    """A checked genesis document; rows sorted by their first key. Keys are raw, 32 bytes."""

    chain: str
    time_ms: int
    """Milliseconds since 1970, UTC; the time of height 0."""
    protocol: tuple[tuple[int, int], ...]
    """(height, version): from that height on that version is in force."""
    accounts: tuple[tuple[bytes, int], ...]
    """(owner, balance)"""
    validators: tuple[Validator, ...]
    work_stakes: tuple[tuple[bytes, int], ...]
    """(owner, work stake)"""
    nodes: tuple[tuple[bytes, bytes], ...]
    """(owner, node): bindings besides those of `validators`; an owner may have several."""
    mature_classes: tuple[str, ...]
    """Classes whose mismatches convict from the start; "*" means every class."""
    auditors: tuple[bytes, ...]
    """Owners that audit while the network is small."""
    parameters: Parameters


class _Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The shape of the document as people write it."""

    chain: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
    time: str
    validators: Annotated[
        list[tuple[str, str, _Stake]], msgspec.Meta(min_length=1, max_length=VALIDATORS_MAX)
    ]
    accounts: list[tuple[str, _Money]] = []
    protocol: list[
        tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=1)]]
    ] = msgspec.field(default_factory=lambda: [(0, 1)])
    work_stakes: list[tuple[str, _Stake]] = []
    nodes: list[tuple[str, str]] = []
    mature_classes: list[Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,64}$")]] = []
    auditors: list[str] = []
    parameters: dict[str, Any] = {}


_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{3})?Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def load_genesis(raw: bytes, limit: int = GENESIS_BYTES_MAX) -> Genesis:
    """Read and check genesis.json; GenesisError names the field that is wrong."""
    if len(raw) > limit:
        raise GenesisError(f"the document has {len(raw)} bytes; at most {limit} are allowed")
    try:
        document = json.loads(
            raw,
            object_pairs_hook=_without_duplicates,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except (ValueError, RecursionError) as error:
        raise GenesisError(f"not JSON: {error}") from error
    return genesis_from_document(document)


def genesis_from_toml(raw: bytes, limit: int = GENESIS_BYTES_MAX) -> Genesis:
    """Read and check a genesis written as TOML, with the same names as the JSON document."""
    if len(raw) > limit:
        raise GenesisError(f"the document has {len(raw)} bytes; at most {limit} are allowed")
    try:
        document = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise GenesisError(f"not TOML: {error}") from error
    return genesis_from_document(document)


def genesis_from_document(document: object) -> Genesis:
    """Check a parsed document; GenesisError names the field that is wrong."""
    checked = _convert(document, _Document, "")
    unknown = sorted(set(checked.parameters) - set(Parameters.__struct_fields__))
    if unknown:
        raise GenesisError(f"parameters.{unknown[0]}: no such parameter")
    parameters = _convert(checked.parameters, _ParametersDocument, "parameters")
    genesis = Genesis(
        chain=checked.chain,
        time_ms=_milliseconds(checked.time),
        protocol=tuple(checked.protocol),
        accounts=_by_owner("accounts", checked.accounts),
        validators=_validators(checked.validators),
        work_stakes=_by_owner("work_stakes", checked.work_stakes),
        nodes=_nodes(checked.nodes),
        mature_classes=_unique("mature_classes", checked.mature_classes),
        auditors=_unique(
            "auditors", [_key(f"auditors[{i}]", text) for i, text in enumerate(checked.auditors)]
        ),
        parameters=Parameters(**msgspec.structs.asdict(parameters)),
    )
    _check(genesis)
    return genesis


def genesis_document(genesis: Genesis) -> dict[str, object]:
    """The document of `genesis` as people write it, complete and in canonical row order."""
    names = Parameters.__struct_fields__
    return {
        "chain": genesis.chain,
        "time": _time_text(genesis.time_ms),
        "protocol": [list(row) for row in genesis.protocol],
        "accounts": [[address(owner), amount] for owner, amount in genesis.accounts],
        "validators": [[address(v.owner), address(v.node), v.stake] for v in genesis.validators],
        "work_stakes": [[address(owner), amount] for owner, amount in genesis.work_stakes],
        "nodes": [[address(owner), address(node)] for owner, node in genesis.nodes],
        "mature_classes": list(genesis.mature_classes),
        "auditors": [address(owner) for owner in genesis.auditors],
        "parameters": {
            name: list(value) if isinstance(value, tuple) else value
            for name in names
            for value in [getattr(genesis.parameters, name)]
        },
    }


def genesis_bytes(genesis: Genesis) -> bytes:
    """The canonical JSON of the document."""
    return json.dumps(genesis_document(genesis), sort_keys=True, separators=(",", ":")).encode()


def chain_id(genesis: Genesis) -> bytes:
    """SHA-256 of the canonical document: 32 bytes, part of everything that is signed."""
    return sha256(genesis_bytes(genesis))


def validators(genesis: Genesis) -> tuple[Validator, ...]:
    """The first validator set, sorted by owner key."""
    return genesis.validators


def node_owners(genesis: Genesis) -> dict[bytes, bytes]:
    """Every node key that genesis binds, with its owner."""
    return {v.node: v.owner for v in genesis.validators} | {n: o for o, n in genesis.nodes}


def supply(genesis: Genesis) -> int:
    """Everything that exists at height 0: balances, vote stakes and work stakes."""
    return (
        sum(amount for _, amount in genesis.accounts)
        + sum(v.stake for v in genesis.validators)
        + sum(amount for _, amount in genesis.work_stakes)
    )


def protocol_at(genesis: Genesis, height: int) -> int:
    """The protocol version in force at `height`."""
    return max(row for row in genesis.protocol if row[0] <= height)[1]


_ParametersDocument = msgspec.defstruct(
    "_ParametersDocument",
    [(f.name, f.type, f.default) for f in msgspec.structs.fields(Parameters)],
    forbid_unknown_fields=True,
)
"""`Parameters` as an object with named fields; the record itself is an array on the wire."""


def _convert(value: object, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        name = (where + path.rstrip("`")).lstrip(".")
        raise GenesisError(f"{name}: {message}" if name else message) from error


def _without_duplicates(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _refuse_number(text: str) -> object:
    raise ValueError(f"the number {text} is not an integer")


def _key(where: str, text: str) -> bytes:
    try:
        return public_key(text)
    except DecodeError as error:
        raise GenesisError(f"{where}: {error}") from error


def _unique(where: str, values: Iterable[Any]) -> tuple[Any, ...]:
    ordered = sorted(values)
    for one, two in pairwise(ordered):
        if one == two:
            raise GenesisError(f"{where}: {_name(one)} stands twice")
    return tuple(ordered)


def _name(value: str | bytes) -> str:
    return address(value) if isinstance(value, bytes) else value


def _by_owner(where: str, rows: list[tuple[str, int]]) -> tuple[tuple[bytes, int], ...]:
    keys = [_key(f"{where}[{i}][0]", text) for i, (text, _) in enumerate(rows)]
    _unique(where, keys)
    return tuple(sorted(zip(keys, (amount for _, amount in rows), strict=True)))


def _validators(rows: list[tuple[str, str, int]]) -> tuple[Validator, ...]:
    found = [
        Validator(_key(f"validators[{i}][0]", owner), _key(f"validators[{i}][1]", node), stake)
        for i, (owner, node, stake) in enumerate(rows)
    ]
    _unique("validators", (v.owner for v in found))
    _unique("validators", (v.node for v in found))
    return tuple(sorted(found, key=lambda v: v.owner))


def _nodes(rows: list[tuple[str, str]]) -> tuple[tuple[bytes, bytes], ...]:
    found = [
        (_key(f"nodes[{i}][0]", owner), _key(f"nodes[{i}][1]", node))
        for i, (owner, node) in enumerate(rows)
    ]
    _unique("nodes", (node for _, node in found))
    return tuple(sorted(found))


def _milliseconds(text: str) -> int:
    if not _TIME.fullmatch(text):
        raise GenesisError(
            f"time: {text!r} is not a UTC time such as 2026-01-01T00:00:00Z (or with .123)"
        )
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise GenesisError(f"time: {text!r}: {error}") from error
    if moment < _EPOCH:
        raise GenesisError(f"time: {text!r} lies before 1970")
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _time_text(time_ms: int) -> str:
    moment = _EPOCH + timedelta(milliseconds=time_ms)
    fraction = f".{time_ms % 1000:03d}" if time_ms % 1000 else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def _check(genesis: Genesis) -> None:
    """What no single field can say."""
    heights = [height for height, _ in genesis.protocol]
    versions = [version for _, version in genesis.protocol]
    if not heights or heights[0] != 0:
        raise GenesisError("protocol: the first row must be for height 0")
    if heights != sorted(set(heights)) or versions != sorted(set(versions)):
        raise GenesisError("protocol: heights and versions must ascend")
    if supply(genesis) >= SUPPLY_LIMIT:
        raise GenesisError(
            f"accounts, validators, work_stakes: together {supply(genesis)}; the supply must stay"
            " below 2**63"
        )
    of_validators = {v.node: v.owner for v in genesis.validators}
    for owner, node in genesis.nodes:
        if of_validators.get(node, owner) != owner:
            raise GenesisError(
                f"nodes: {address(node)} is bound to {address(owner)}, in validators to another"
                " owner; a node works for one owner"
            )
    owners = {
        *(owner for owner, _ in genesis.accounts),
        *(owner for owner, _ in genesis.work_stakes),
        *node_owners(genesis).values(),
    }
    for node in node_owners(genesis):
        if node in owners:
            raise GenesisError(
                f"nodes, validators: {address(node)} is a node and an owner; use two keys"
            )
    for owner in genesis.auditors:
        if owner not in owners:
            raise GenesisError(
                f"auditors: {address(owner)} has no account, stake or node in this document"
            )
    parameters = genesis.parameters
    if parameters.leader_away_ms > parameters.view_timeout_ms:
        raise GenesisError("parameters.leader_away_ms: must not exceed view_timeout_ms")
    if parameters.interval_ms > parameters.heartbeat_ms:
        raise GenesisError("parameters.interval_ms: must not exceed heartbeat_ms")
