"""Messages between the daemon and its carrier; `controlsocket` carries them.

An AF_UNIX SOCK_SEQPACKET pair keeps message borders, so a message is one msgspec MessagePack object
of at most MESSAGE_BYTES, with file descriptors beside it (SCM_RIGHTS) where a message says so.

    daemon -> carrier   Configure first, then requests; each has an id
    carrier -> daemon   Ready, then exactly one reply (Done, Failed or a result) to each request
                        that was not cancelled, with its id, in any order, and events without id

Either end that reads something malformed stops: the other end is our own code or nothing at all.
End of file at the carrier means that the daemon is gone, and ends the carrier.
"""

from typing import Annotated

import msgspec

from tdmld.node.errors import ControlError

MESSAGE_BYTES = 64 * 1024
"""Greatest control message. A spec does not fit beside anything else: it travels as a file."""
MAX_DESCRIPTORS = 2
MAX_PEERS = 256
"""Carriers that a machine stays connected with."""
MAX_BANS = 256
"""Of the daemon; those of the configuration and by hand come first. They fill a message."""
MAX_REASON = 40
MAX_ADDRESSES = 8
"""Of one of them."""
MAX_MEMBERS = 1000
"""Sessions that may fetch content of one job; their names fill a message."""
MAX_RELAYS = 16
MAX_RELAYED = 1800
"""Keys of nodes and sessions that a carrier relays for; they fill a message."""
MAX_HOLDERS = 16
MAX_TEXT = 2000
MAX_CAUSE = 32
MAX_SHARDS = 1024
MAX_SEQ = 2**62 - 1
MAX_LANES = 16
MAX_LINKS = 2 + MAX_LANES - 1
"""Of a slot: up, down, and one to each sibling lane."""
MAX_FRAME_BYTES = 64 << 20
MAX_PLACES = 4096
"""Of shared memory, for one direction of a link."""
MAX_GIVEN = 64 + 256
"""Files of given weights of one job: one a stage and, when it goes on with moments, one a slot.
With MAX_MEMBERS they fill a message."""

Id32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
Session = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
Holders = Annotated[tuple[Session, ...], msgspec.Meta(max_length=MAX_HOLDERS)]
Sessions = Annotated[tuple[Session, ...], msgspec.Meta(max_length=MAX_MEMBERS)]
Shards = Annotated[tuple[tuple[Id32, Size], ...], msgspec.Meta(max_length=MAX_SHARDS)]
"""(content id, size) in the order of the text."""
Addresses = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=MAX_ADDRESSES)
]
LinkName = Annotated[str, msgspec.Meta(pattern=r"^(up|down|lane(0|[1-9][0-9]?))$")]
Seq = Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQ)]
Lane = Annotated[int, msgspec.Meta(ge=0, lt=MAX_LANES)]
Roots = Annotated[tuple[Id32, ...], msgspec.Meta(max_length=MAX_GIVEN)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all control messages."""


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """(job, lane, stage)."""

    job: Id32
    lane: Count
    stage: Count


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A carrier's session and where it listens."""

    session: Session
    addresses: Addresses


class Link(msgspec.Struct, frozen=True):
    """One link of a slot, as its carrier must know it: who is at the other end, and how much.

    name            "up", "down" or "lane<k>", as seen from the slot
    peer            session of the other end's carrier
    other_*         slot (of the same job) and link name there
    segments        the first so many segments have frames; later ones have none
    segment_frames  frames of each of them, the same in both directions
    frame_bytes     the greatest frame
    ahead           by how much an arriving number may exceed the highest that we sent (LINK-3)
    places          of shared memory, for each direction
    incarnation     the least that the other end may have
    """

    name: LinkName
    peer: Session
    other_lane: Count
    other_stage: Count
    other_link: LinkName
    segments: Count
    segment_frames: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    frame_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAME_BYTES)]
    ahead: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    places: Annotated[int, msgspec.Meta(ge=1, le=MAX_PLACES)]
    incarnation: Count = 0


# --- daemon -> carrier ------------------------------------------------------------------------


class Configure(Message, frozen=True):
    """The first message."""

    data_dir: PathText
    chain_id: Id32
    listen: Annotated[tuple[str, ...], msgspec.Meta(max_length=8)]
    content_quota: Size


class SetPeers(Message, frozen=True):
    """Replaces the set of carriers to stay connected with."""

    id: int
    peers: Annotated[tuple[Peer, ...], msgspec.Meta(max_length=MAX_PEERS)]


class Denied(msgspec.Struct, frozen=True, array_like=True):
    """A PeerId or an IP network that may not connect; `until` as in `tdmld.p2p.Ban`."""

    subject: Annotated[str, msgspec.Meta(max_length=128)]
    until: float | None
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class SetBans(Message, frozen=True):
    """Replaces what the daemon denies; what the carrier found out by itself stays."""

    id: int
    bans: Annotated[tuple[Denied, ...], msgspec.Meta(max_length=MAX_BANS)]


class SetMembers(Message, frozen=True):
    """Replaces the sessions that may fetch content of `job`, and the spec id under which its data
    is sealed (None: it is open); an empty set closes it. With `private` nobody gets the job's
    result, nor states and contributions of stage 0. `given` are the roots of the given weights that
    they may have."""

    id: int
    job: Id32
    sessions: Sessions
    sealed: Id32 | None
    private: bool = False
    given: Roots = ()


class Rekey(Message, frozen=True):
    """A member of a sealed job was replaced: SetMembers with those who remain, then a new key epoch
    under which everything is sealed from now on. For the carrier that published the spec."""

    id: int
    job: Id32
    sessions: Sessions
    sealed: Id32
    private: bool = False
    given: Roots = ()


class ImportText(Message, frozen=True):
    """Cut a file into shards and keep them, sealed under a spec id if there is one. Reply:
    Imported."""

    id: int
    path: PathText
    sealed: Id32 | None


class FetchData(Message, frozen=True):
    """Bring the data shards that are not here, and the content key of sealed ones."""

    id: int
    job: Id32
    sealed: Id32 | None
    shards: Shards
    holders: Holders


class HandData(Message, frozen=True):
    """Give the whole text to a worker, in memory: one descriptor comes along, a socket on which the
    carrier sends it the descriptor of a memory file. The daemon never sees that one."""

    id: int
    sealed: Id32 | None
    shards: Shards


class StateFile(msgspec.Struct, frozen=True, tag=True):
    """A part of a slot's state at a boundary; `part` is "shared" or "lane"."""

    slot: Slot
    boundary: Count
    part: Annotated[str, msgspec.Meta(pattern=r"^(shared|lane)$")]


class FramesFile(msgspec.Struct, frozen=True, tag=True):
    """What the slot sent on a link during a segment."""

    slot: Slot
    segment: Count
    link: LinkName


class FrameFile(msgspec.Struct, frozen=True, tag=True):
    """One frame that the slot sent on a link, also while its log still grows: the record of its log
    (`tdmld.train.framelog`). Asked for by ProbeFrame."""

    slot: Slot
    link: LinkName
    seq: Seq


class ContributionFile(msgspec.Struct, frozen=True, tag=True):
    """What a slot contributed to an outer round; `content` is the BLAKE3 of its bytes, and what is
    fetched has it. The slot itself has it, and whoever holds it for another slot of the stage."""

    slot: Slot
    round: Count
    content: Id32


class GivenFile(msgspec.Struct, frozen=True, tag=True):
    """Given weights, by the root of the part of a state that they are: who asks checks it."""

    job: Id32
    root: Id32


class ResultFile(msgspec.Struct, frozen=True, tag=True):
    """One file of a job's result."""

    job: Id32
    name: FileName


class Blob(msgspec.Struct, frozen=True, tag=True):
    """Content by its id, of use to `job`."""

    job: Id32
    content: Id32


Item = StateFile | FramesFile | FrameFile | ContributionFile | GivenFile | ResultFile | Blob
"""What one carrier can ask of another."""


class FetchFile(Message, frozen=True):
    """Bring a named file of a job to `destination` (inside the data directory, or an output
    directory that the user named). Reply: Stored."""

    id: int
    item: Item
    limit: Size
    holders: Holders
    destination: PathText


class ProbeFrame(Message, frozen=True):
    """As a witness: does `holder`, who has `slot`, give out the frame `seq` that the slot should
    have sent on `link`, signed by itself in this epoch or an older one? Reply: Probed."""

    id: int
    slot: Slot
    epoch: Count
    link: LinkName
    seq: Seq
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAME_BYTES)]
    holder: Session


class ListResult(Message, frozen=True):
    """Names and sizes of the files of a job's result at the first holder that has one."""

    id: int
    job: Id32
    holders: Holders


class OpenSlot(Message, frozen=True):
    """Serve a live worker that begins at boundary `start`. What lies in the ring of the slot's
    directory from there on is taken up again. Two descriptors come along: the carrier's end of the
    worker's packet socket and the memory file (`channel.FrameMemory` of these links, in order)."""

    id: int
    slot: Slot
    epoch: Count
    incarnation: Count
    rounds: Count
    """Segments of the slot."""
    start: Count
    links: Annotated[tuple[Link, ...], msgspec.Meta(max_length=MAX_LINKS)]


class SetLinkPeer(Message, frozen=True):
    """At the other end of a link of an open slot is somebody else now. An incarnation older than
    the newest known one changes nothing."""

    id: int
    slot: Slot
    link: LinkName
    session: Session
    incarnation: Count


class Grant(Message, frozen=True):
    """The worker may run segments < `until`; `included` are the lanes whose contributions to round
    `until` - 2 enter segment `until` - 1 (none where there are no rounds)."""

    id: int
    slot: Slot
    until: Count
    included: Annotated[tuple[Lane, ...], msgspec.Meta(max_length=MAX_LANES)] = ()


class CloseSlot(Message, frozen=True):
    """Stop serving a worker. With `abort` the links are dropped at once; else the worker is told
    to end and the links say goodbye first, for a few seconds at most."""

    id: int
    slot: Slot
    abort: bool


class Discard(Message, frozen=True):
    """Frames of segments < `keep_from` of the slot are of no use to anybody any more: digests are
    forgotten, and who asks for them is refused. The daemon removes the files."""

    id: int
    slot: Slot
    keep_from: Count


class DialBack(Message, frozen=True):
    """Dial a session anew, for a receipt. Reply: Dialled."""

    id: int
    session: Session
    addresses: Addresses


class ConnectDirect(Message, frozen=True):
    """Connect with a session directly, through a punched hole if need be. Reply: Direct."""

    id: int
    session: Session
    addresses: Addresses
    seconds: Annotated[float, msgspec.Meta(gt=0, le=60)]


class SetRelays(Message, frozen=True):
    """Replaces the carriers through which others may reach this one, the first by preference."""

    id: int
    peers: Annotated[tuple[Peer, ...], msgspec.Meta(max_length=MAX_RELAYS)]


class SetRelaying(Message, frozen=True):
    """Replaces those whom this carrier relays for, besides its own jobs' peers."""

    id: int
    keys: Annotated[tuple[Id32, ...], msgspec.Meta(max_length=MAX_RELAYED)]


class AskNetwork(Message, frozen=True):
    """What is the carrier's place in the network? Reply: Network."""

    id: int


class Cancel(Message, frozen=True):
    """Whoever asked for request `id` has gone: a fetch stops and leaves nothing behind. Others are
    carried out. There is no reply, neither to this nor to what it stopped."""

    id: int


Request = (
    SetPeers
    | SetBans
    | SetMembers
    | Rekey
    | ImportText
    | FetchData
    | HandData
    | FetchFile
    | ProbeFrame
    | ListResult
    | OpenSlot
    | SetLinkPeer
    | Grant
    | CloseSlot
    | Discard
    | DialBack
    | ConnectDirect
    | SetRelays
    | SetRelaying
    | AskNetwork
)
ToCarrier = Configure | Request | Cancel


# --- carrier -> daemon ------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The carrier listens."""

    session: Session
    addresses: tuple[str, ...]


class Done(Message, frozen=True):
    """The request was carried out."""

    id: int


class Failed(Message, frozen=True):
    """The request failed. `kind` is a class name of tdmld.node.errors."""

    id: int
    kind: str
    text: Text


class Imported(Message, frozen=True):
    """Shards of a text: (id, size) in order."""

    id: int
    shards: Shards


class Stored(Message, frozen=True):
    """A file is here, whole and synced; all `holders` said that they have these bytes."""

    id: int
    holders: Holders


class Listing(Message, frozen=True):
    """Files of a result: (name, size)."""

    id: int
    files: Annotated[tuple[tuple[FileName, Size], ...], msgspec.Meta(max_length=64)]


class Probed(Message, frozen=True):
    """Whether the frame came and is signed; if not, `text` says what came instead."""

    id: int
    delivered: bool
    text: Text


class Dialled(Message, frozen=True):
    """A session proved itself at this address."""

    id: int
    address: str


class Direct(Message, frozen=True):
    """Whether there is a direct connection."""

    id: int
    direct: bool


class Network(Message, frozen=True):
    """The carrier's place in the network."""

    id: int
    connected: int
    relayed: int
    """Of them through a relay."""
    punched: int
    """Holes punched since it started."""
    reservations: int
    """Others that can be reached through us now."""
    circuits: int
    carried: int
    """Bytes relayed since it started."""


class AddressesChanged(Message, frozen=True):
    """Where the carrier can be dialled now."""

    addresses: tuple[str, ...]


class GenesisReported(Message, frozen=True):
    """A live worker has its state at the boundary where it begins, and that state is on disk."""

    slot: Slot
    shared: Id32
    lane: Id32
    data: Id32


class StepReported(Message, frozen=True):
    """A live worker finished a step."""

    slot: Slot
    step: Count
    loss: float | None
    seconds: float
    waiting: float
    verifying: float
    gradient_norm: float


class SegmentReported(Message, frozen=True):
    """List, frames and state of a segment are on disk and agree with what crossed the links."""

    slot: Slot
    segment: Count


class WaitReported(Message, frozen=True):
    """A live worker has waited for this frame for `seconds`; said again while it waits."""

    slot: Slot
    link: LinkName
    seq: Seq
    seconds: float


class SlotEnded(Message, frozen=True):
    """The last segment is done and every link has said goodbye."""

    slot: Slot


class SlotBroken(Message, frozen=True):
    """The slot cannot go on; says why. `cause` is the worker's word for it; of the carrier's own
    causes "link" (what crossed a link contradicts what is on disk) or "disk_full", else nothing."""

    slot: Slot
    text: Text
    cause: Annotated[str, msgspec.Meta(max_length=MAX_CAUSE)] = ""


Reply = Done | Failed | Imported | Stored | Listing | Probed | Dialled | Direct | Network
SlotEvent = GenesisReported | StepReported | SegmentReported | WaitReported | SlotEnded | SlotBroken
CarrierEvent = SlotEvent | AddressesChanged
FromCarrier = Ready | Reply | CarrierEvent

_encoder = msgspec.msgpack.Encoder()
_to_carrier = msgspec.msgpack.Decoder(ToCarrier)
_from_carrier = msgspec.msgpack.Decoder(FromCarrier)


def encode_message(message: Message) -> bytes:
    """The bytes of a message; ControlError when it is too long to send."""
    raw = _encoder.encode(message)
    if len(raw) > MESSAGE_BYTES:
        raise ControlError(
            f"a {type(message).__name__} of {len(raw)} bytes; at most {MESSAGE_BYTES} can be sent"
        )
    return raw


def decode_to_carrier(raw: bytes) -> ToCarrier:
    """Decode what the daemon sent; ControlError."""
    try:
        return _to_carrier.decode(raw)  # type: ignore[no-any-return]
    except msgspec.MsgspecError as error:
        raise ControlError(f"malformed message from the daemon: {error}") from error


def decode_from_carrier(raw: bytes) -> FromCarrier:
    """Decode what the carrier sent; ControlError."""
    try:
        return _from_carrier.decode(raw)  # type: ignore[no-any-return]
    except msgspec.MsgspecError as error:
        raise ControlError(f"malformed message from the carrier: {error}") from error
