"""What a node must be able to answer: the one interface between the RPC server and the daemon.

The server never reaches around it, and a fake of it is all that a test needs. Rules:

- A method answers from finalized state and returns quickly, or says in its docstring that it waits.
- It raises `NotFound`, `Refused`, `NotReady` or `InvalidParams` (tdmld.rpc.errors) with a text that
  names cause and remedy. Any other exception is a bug: the caller sees a correlation id, the log
  the traceback, and the daemon lives on.
- It may be cancelled at any checkpoint (the caller went away) and must leave nothing half done.
- Arguments are already of the annotated types, with ids and addresses well-formed.
- A subscription is an async generator. It yields the present first where that has a meaning, and is
  closed (`aclose`) by the server when the subscriber leaves; its `finally` must not wait.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from tdmld.rpc.nettypes import BanInfo, Connected, DialText, ReasonText, Seconds, SubjectText
from tdmld.rpc.reachtypes import NetReachability
from tdmld.rpc.staketypes import AskRow, NodeKeyInfo, StakeInfo, ValidatorSetInfo
from tdmld.rpc.types import (
    AccountInfo,
    AddressText,
    BlockInfo,
    ChainParameters,
    Earnings,
    FetchedResult,
    Head,
    HeightNumber,
    HexId,
    JobDetail,
    JobEvent,
    JobSummary,
    NameText,
    NodeStatus,
    PathText,
    PeerInfo,
    Proof,
    Published,
    RawHex,
    SpecText,
    Submitted,
    TransactionStatus,
)


class Backend(Protocol):
    """A running node, as its RPC server sees it."""

    async def node_status(self) -> NodeStatus:
        """Identity, sync, market standing and present work of this node."""

    async def node_earnings(self) -> Earnings:
        """Settled and pending income of this node's owner."""

    async def net_peers(self) -> tuple[PeerInfo, ...]:
        """Known nodes, connected ones first."""

    async def net_connect(self, address: DialText) -> Connected:
        """Keep a peer connected from now on (waits for the first dial).

        `address` ends in /p2p/ and the peer's id. Refused says what was tried; the node goes on
        dialling all the same. InvalidParams when it cannot be dialled by anybody.
        """

    async def net_bans(self) -> tuple[BanInfo, ...]:
        """Who may not connect: by the configuration, by command, by the node itself."""

    async def net_ban(
        self, subject: SubjectText, seconds: Seconds = 0, reason: ReasonText = ""
    ) -> BanInfo:
        """Disconnect and refuse a PeerId, IP address or network, for 0 seconds: until net_unban.

        Holds for the carrier, too, and survives a restart.
        """

    async def net_unban(self, subject: SubjectText) -> BanInfo:
        """Take a ban back, also one of the node itself; NotFound.

        One of the configuration returns with the next start.
        """

    async def chain_head(self) -> Head:
        """The newest finalized block."""

    async def chain_block(self, height: HeightNumber) -> BlockInfo:
        """A finalized block; NotFound above the head."""

    async def chain_account(self, address: AddressText) -> AccountInfo:
        """An account, zeros for one that was never used. Refused when `address` is no address."""

    async def chain_transaction(self, id: HexId) -> TransactionStatus:
        """A transaction in the mempool or in a block; NotFound for one never seen."""

    async def chain_submit(self, raw: RawHex) -> Submitted:
        """Admit a signed transaction (hex); Refused names the rule. Does not wait for a block."""

    async def chain_prove(self, kind: NameText, key: NameText, checkpoint: int = 0) -> Proof:
        """A proof for somebody who has no chain and need not trust this node.

        Waits for a block that commits the present state; on an idle chain it is there.
        `account ADDRESS`, `facts ADDRESS`, `node ADDRESS`, `job ID`, `payment JOB/ADDRESS`,
        `slot JOB/SLOT`, `segment` or `audit JOB/SLOT/SEGMENT`, `transaction ID`, `block HEIGHT`.
        `checkpoint` is a height that the verifier trusts; 0: none. InvalidParams names what
        cannot be read, NotFound what this node cannot prove.
        """

    async def chain_parameters(self) -> ChainParameters:
        """The genesis rules and validators."""

    async def chain_validators(self, epoch: int = -1) -> ValidatorSetInfo:
        """The validators of an epoch: -1 is the present one.

        The sets of the next epoch and of all past ones are known; NotFound for any other.
        """

    async def chain_stake(self, address: AddressText) -> StakeInfo:
        """An owner's stake, what of it unbinds, its seats in this epoch and the next, offences."""

    async def chain_keys(self, address: AddressText) -> tuple[NodeKeyInfo, ...]:
        """The node keys that are registered to an owner. Looks at every node of the chain."""

    async def chain_asks(self) -> tuple[AskRow, ...]:
        """The asks in force, the cheapest first."""

    def chain_subscribe_heads(self) -> AsyncIterator[Head]:
        """The present head, then each newly finalized block, none left out."""

    async def job_publish(
        self,
        spec: SpecText,
        text_path: PathText,
        name: NameText = "",
        given_path: NameText = "",
    ) -> Published:
        """Take a spec (canonical JSON text) and the text file that it names by its shards.

        `text_path` is a file on the node's own machine. Refused when the spec is malformed or the
        text's shards are not those of the spec. `name` is remembered for lists on this node.
        `given_path` is the directory with the weights that the spec goes on from, if it does.
        """

    async def job_list(self) -> tuple[JobSummary, ...]:
        """All jobs of the chain, newest first."""

    async def job_status(self, id: HexId) -> JobDetail:
        """One job; NotFound."""

    def job_subscribe(self, id: HexId) -> AsyncIterator[JobEvent]:
        """Events of one job from now on; ends after the job's final state. NotFound."""

    async def job_fetch(self, id: HexId, out_dir: PathText) -> FetchedResult:
        """Fetch and verify a finished job's model into `out_dir` on the node's machine (waits).

        Refused while the job has no result; NotFound. The receipt (a Fetched transaction) is the
        submitter's to sign: commands do it, with chain_submit.
        """

    async def net_reachability(self, refresh: bool = False) -> NetReachability:
        """Whether others can dial this node, who says so, and what it does about it.

        With `refresh` every witness is asked again first: some seconds, 20 at most.
        """

    async def admin_stop(self) -> None:
        """Begin a clean stop of the daemon; returns at once."""
