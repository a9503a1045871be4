"""What travels over JSON-RPC, for servers, clients and the dashboard alike.

Conventions of every type here:

- amounts are decimal strings of whole units (JSON numbers lose digits beyond 2**53);
- hashes and ids are lower-case hex, 64 characters; addresses are PeerId strings (`12D3Koo...`);
- times are RFC 3339 in UTC with milliseconds (`time_text` makes them);
- reputation is in millionths, losses are in micro-nats a token (integers, as on the chain);
- whatever comes from the chain is finalized, and `height` says as of which block.

Unknown fields are ignored by clients, so that an older client can talk to a newer node.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec

from tdmld.rpc.jobtypes import Bottleneck, FormerWorker, SlotTimes
from tdmld.rpc.wire import AddressText as AddressText
from tdmld.rpc.wire import AmountText as AmountText
from tdmld.rpc.wire import HeightNumber as HeightNumber
from tdmld.rpc.wire import Wire as Wire

HexId = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]*$")]
RawHex = Annotated[str, msgspec.Meta(min_length=2, max_length=2 * 2**13, pattern=r"^[0-9a-f]+$")]
"""A signed transaction, at most 8 KiB of bytes."""
SpecText = Annotated[str, msgspec.Meta(min_length=2, max_length=65536)]
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
NameText = Annotated[str, msgspec.Meta(max_length=200)]

JobState = Literal[
    "offered",
    "matched",
    "preparing",
    "active",
    "finishing",
    "closed",
    "refunded",
    "expired",
]
"""ANNEX A2; the last three are final."""
FINAL_JOB_STATES = frozenset({"closed", "refunded", "expired"})

AuditState = Literal["drawn", "committed", "opened", "passed", "mismatch", "expired", "unaudited"]
EventKind = Literal[
    "state", "step", "segment", "round", "audit", "settled", "payment", "fault", "repair", "result"
]
Role = Literal["worker", "standby", "auditor"]


def time_text(milliseconds: int) -> str:
    """Unix milliseconds as RFC 3339 in UTC: `2026-01-01T00:00:00.000Z`."""
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03d}Z"


class AskInfo(Wire, frozen=True):
    """What this node offers at the market."""

    price: AmountText
    """Units per (10**6 parameters x 10**3 tokens)."""
    device_class: str
    memory: int
    """Bytes."""
    audit_capacity: int
    standby_slots: int
    until: HeightNumber
    open: int = 0
    """Other owners who dialled this node's carrier."""
    paths: tuple[AddressText, ...] = ()
    """Nodes whose carriers are connected directly with this one's."""


class SlotRun(Wire, frozen=True):
    """A task that this node does now."""

    job: HexId
    role: Role
    lane: int
    stage: int
    layers: tuple[int, int]
    """First layer, and one past the last."""
    state: str
    """A short phrase for people: running, waiting for 12D3Koo..., drawing weights."""
    segment: int
    """The one at work, from 0 (an auditor: the one that it replays)."""
    segments: int
    step: int
    steps: int
    settled: int
    """Segments of this slot that are settled."""
    earned: AmountText
    """From this task, settled."""
    tokens_per_second: float = 0.0


class NodeStatus(Wire, frozen=True):
    """One look at a node: who it is, whether it is live, what it earns and why not."""

    version: str
    node: AddressText
    owner: AddressText
    session: str
    """The carrier's PeerId; empty while there is none."""
    chain: str
    chain_id: HexId
    height: HeightNumber
    head: HexId
    view: int
    syncing: bool
    peers: int
    validator: bool
    balance: AmountText
    """Spendable, of the owner."""
    work_stake: AmountText
    vote_stake: AmountText
    reputation: int
    """Of the node's owner, in millionths."""
    earned: AmountText
    """All settled payments to the owner for work of this node."""
    pending: AmountText
    """Work done whose segments are not settled yet, at their price."""
    started: str
    ask: AskInfo | None = None
    tasks: tuple[SlotRun, ...] = ()
    why_not_earning: str = ""
    """One line with cause and remedy; empty while the node has work."""
    epoch: int = 0
    """Of the block after `height`."""
    weight: AmountText = "0"
    """Of this node's votes in `epoch`; 0 when it does not validate."""
    next_weight: AmountText = "0"
    """In the epoch after it, whose validators are fixed already."""
    total_weight: AmountText = "0"
    """Of all votes in `epoch`."""


class Head(Wire, frozen=True):
    """A finalized block, in brief."""

    height: HeightNumber
    hash: HexId
    view: int
    time: str
    proposer: AddressText
    transactions: int


class TransactionLine(Wire, frozen=True):
    """One transaction of a block with its outcome."""

    id: HexId
    kind: str
    signer: AddressText
    ok: bool
    reason: str = ""


class BlockInfo(Wire, frozen=True):
    """A finalized block."""

    height: HeightNumber
    hash: HexId
    parent: HexId
    view: int
    time: str
    proposer: AddressText
    state_height: HeightNumber
    state_root: HexId
    size: int
    """Bytes of header and body."""
    transactions: tuple[TransactionLine, ...] = ()


class AccountInfo(Wire, frozen=True):
    """An account; one that nobody ever used has zeros everywhere."""

    address: AddressText
    height: HeightNumber
    balance: AmountText
    nonce: int
    """What the next transaction of this key must carry."""
    vote_stake: AmountText = "0"
    work_stake: AmountText = "0"
    unbonding: AmountText = "0"
    """Taken out of the stakes and not withdrawn yet."""
    locked: AmountText = "0"
    """In escrows and deposits of its own open jobs."""
    reputation: int = 0


class Submitted(Wire, frozen=True):
    """A transaction was admitted to the mempool."""

    id: HexId
    height: HeightNumber


class TransactionStatus(Wire, frozen=True):
    """Where a transaction stands. `failed` is final, too: it stands in a block, without effect."""

    id: HexId
    state: Literal["pending", "ok", "failed"]
    height: HeightNumber
    """The chain's height at the time of the answer."""
    block: HeightNumber | None = None
    reason: str = ""


class Proof(Wire, frozen=True):
    """A proof bundle, for `tdmld light verify`."""

    height: HeightNumber
    """Of the final block that vouches for it."""
    hash: HexId
    raw: str
    """The bundle in hex: docs/spec/chain.md."""


class ValidatorInfo(Wire, frozen=True):
    """A seat of an epoch."""

    owner: AddressText
    node: AddressText
    weight: AmountText
    """Of its votes: its owner's vote stake, which it follows at a bounded pace."""
    leads: bool
    """Whether it has turns to lead in that epoch; it votes in any case."""
    jailed: HeightNumber
    """Height at which its node was jailed for missing turns, 0 while it is not."""


class ChainParameters(Wire, frozen=True):
    """The genesis rules, names as in the genesis document, and the validators of the present
    epoch."""

    chain: str
    chain_id: HexId
    height: HeightNumber
    time: str
    """Of genesis."""
    protocol: int
    parameters: dict[str, int | list[int]]
    epoch: int
    """Of the block after `height`."""
    validators: tuple[ValidatorInfo, ...]


class Published(Wire, frozen=True):
    """A spec and its data are held by this node and offered to others."""

    spec_id: HexId
    shards: int
    """How many, all checked against the spec."""
    size: int
    """Bytes of the text."""


class JobSummary(Wire, frozen=True):
    """A line of a job list."""

    id: HexId
    state: JobState
    submitter: AddressText
    height: HeightNumber
    """As of which this is."""
    offered: HeightNumber
    """Height of the offer's block."""
    family: str
    stages: int
    lanes: int
    rounds: int
    steps: int
    segments_settled: int
    """Over all slots, of rounds x lanes x stages."""
    escrow: AmountText
    """Locked at the offer, without the deposit."""
    spent: AmountText
    name: str = ""
    """Known only to the node through which it was submitted."""
    reason: str = ""
    loss: int | None = None
    """Of the newest committed segment, micro-nats a token, mean over lanes."""


class SlotInfo(Wire, frozen=True):
    """One stage of one lane, and who runs it."""

    lane: int
    stage: int
    layers: tuple[int, int]
    worker: str
    """Node address; empty before matching."""
    state: str
    """waiting, accepted, ready, running, stalled, done, failed: a short phrase."""
    segment: int
    """Segments committed so far; the next one is at work."""
    settled: int
    price: AmountText
    """Per segment."""
    earned: AmountText = "0"
    incarnation: int = 0
    """Grows when another worker takes the slot, or is asked to."""
    held: int = 0
    """The boundary at which a replacement would begin."""
    step: int | None = None
    """Steps done. This and what follows is what the worker's node says; None or empty when it has
    not said anything lately."""
    loss: int | None = None
    """Of the last step, in micro-nats a token, of a slot that has the head."""
    gradient_norm: float | None = None
    tokens_per_second: float = 0.0
    restarts: int = 0
    """Times that its worker process was started again."""
    times: SlotTimes | None = None


class StandbyInfo(Wire, frozen=True):
    """Who holds copies of which slots."""

    node: str
    slots: tuple[tuple[int, int], ...]
    """(lane, stage)."""
    proved: int
    """The latest boundary whose copy was proved."""
    earned: AmountText = "0"


class AuditInfo(Wire, frozen=True):
    """One drawn audit."""

    lane: int
    stage: int
    segment: int
    auditor: str
    """Node address; empty while none was found."""
    state: AuditState
    drawn: HeightNumber = 0


class SegmentLoss(Wire, frozen=True):
    """Mean training loss of one committed segment of a lane's last stage."""

    lane: int
    segment: int
    loss: int
    """Micro-nats a token."""


class ResultFile(Wire, frozen=True):
    name: str
    size: int


class ResultStatus(Wire, frozen=True):
    """The trained model: attested by holders, fetched or waiting."""

    id: HexId
    holders: tuple[str, ...]
    fetched: bool


class JobDetail(Wire, frozen=True):
    """All that this node knows of a job."""

    summary: JobSummary
    spec_id: HexId
    segment_steps: int
    """K."""
    slots: tuple[SlotInfo, ...]
    standbys: tuple[StandbyInfo, ...] = ()
    audits: tuple[AuditInfo, ...] = ()
    """Of the newest segments."""
    losses: tuple[SegmentLoss, ...] = ()
    """Of all segments; of a very long job, of evenly spaced ones."""
    """By segment, then lane."""
    budget: AmountText = "0"
    """The most that the job may cost: escrow and deposit."""
    payments: dict[str, AmountText] = msgspec.field(default_factory=dict)
    """Owner address to what the job has paid it, in all roles."""
    deadline: HeightNumber = 0
    result: ResultStatus | None = None
    epoch: int = 0
    """Rollbacks so far."""
    former: tuple[FormerWorker, ...] = ()
    """Who had a slot before, by slot, the first one first."""
    lost_lanes: tuple[int, ...] = ()
    """Lanes that nobody was left for."""
    bottleneck: Bottleneck | None = None


class JobEvent(Wire, frozen=True):
    """Something happened in a job. `text` is a full sentence for people; the rest for programs."""

    job: HexId
    height: HeightNumber
    time: str
    kind: EventKind
    text: str
    state: JobState | None = None
    lane: int | None = None
    stage: int | None = None
    segment: int | None = None
    step: int | None = None
    loss: int | None = None
    """Micro-nats a token, of the step or the segment."""
    address: str = ""
    amount: AmountText = "0"


class FetchedResult(Wire, frozen=True):
    """A finished job's model lies on this node's disk, verified."""

    job: HexId
    result_id: HexId
    directory: str
    files: tuple[ResultFile, ...]


class PeerInfo(Wire, frozen=True):
    """A node that this one knows."""

    node: AddressText
    addresses: tuple[str, ...]
    connected: bool
    validator: bool = False
    owner: str = ""
    height: HeightNumber | None = None
    """The peer's, as it last said."""
    round_trip_ms: float | None = None
    kept: bool = False
    """Whether the node dials it again when it is away."""
    direction: Literal["inbound", "outbound"] | None = None
    """Who dialled the present connection."""
    path: Literal["direct", "relayed"] | None = None
    remote: str = ""
    """The other end of the present connection."""
    transport: str = ""
    """What was negotiated: security and muxer."""
    bytes_in: int = 0
    """Since this node started, everything included."""
    bytes_out: int = 0
    messages_in: int = 0
    messages_out: int = 0
    gossip_bytes: int = 0
    """Bodies of gossip that it handed to this node."""
    spent_ms: float = 0.0
    """This node's time for checking what it sent."""
    score: float = 0.0
    """What its offences weigh now; at 100 it is banned for a time."""
    banned: bool = False
    last_error: str = ""
    """Why the last dial failed."""


class JobEarnings(Wire, frozen=True):
    job: HexId
    worker: AmountText
    standby: AmountText
    audit: AmountText
    pending: AmountText


class EarningsBucket(Wire, frozen=True):
    start: str
    amount: AmountText


class Earnings(Wire, frozen=True):
    """What the owner of this node earned with it."""

    height: HeightNumber
    total: AmountText
    pending: AmountText
    jobs: tuple[JobEarnings, ...] = ()
    buckets: tuple[EarningsBucket, ...] = ()
    """Recent settled income, oldest first, of equal length (a minute on a local network)."""
    bucket_seconds: int = 60
