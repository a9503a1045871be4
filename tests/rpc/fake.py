"""A node that answers from fixed values, for tests of server, client, commands and dashboard."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import trio

from tdmld.rpc.errors import NotFound, Refused
from tdmld.rpc.nettypes import BanInfo, Connected
from tdmld.rpc.reachtypes import (
    NetReachability,
    ProcessReach,
    RelayingInfo,
    RouterInfo,
    TrialInfo,
    WitnessInfo,
)
from tdmld.rpc.staketypes import (
    AskRow,
    NodeKeyInfo,
    OffenceInfo,
    SeatInfo,
    StakeInfo,
    UnbondingInfo,
    ValidatorSetInfo,
)
from tdmld.rpc.types import (
    AccountInfo,
    AskInfo,
    AuditInfo,
    BlockInfo,
    ChainParameters,
    Earnings,
    EarningsBucket,
    FetchedResult,
    Head,
    JobDetail,
    JobEarnings,
    JobEvent,
    JobSummary,
    NodeStatus,
    PeerInfo,
    Proof,
    Published,
    ResultFile,
    SegmentLoss,
    SlotInfo,
    SlotRun,
    StandbyInfo,
    Submitted,
    TransactionStatus,
    ValidatorInfo,
    time_text,
)

NODES = tuple(
    "12D3KooW" + letter * 40 + tail
    for letter, tail in (("A", "k2Xq"), ("B", "9fQm"), ("C", "aaZz"), ("D", "Hn7e"))
)
OWNER = "12D3KooW" + "E" * 44
JOB = "a91f" + "0" * 60
CHAIN_ID = "c0" * 32
GENESIS_MS = 1_767_225_600_000

REACHABILITY = NetReachability(
    daemon=ProcessReach(
        state="open",
        listening=("/ip4/0.0.0.0/tcp/4001",),
        announced=("/ip4/203.0.113.7/tcp/4001",),
        relayed=(),
    ),
    carrier=ProcessReach(
        state="open",
        listening=("/ip4/0.0.0.0/tcp/4002",),
        announced=("/ip4/203.0.113.7/tcp/4002",),
        relayed=(),
    ),
    settled=True,
    witnesses=(
        WitnessInfo(
            node=NODES[1],
            owner=OWNER,
            seconds_ago=12.0,
            seen_at="203.0.113.7",
            clock_ms=35.0,
            daemon=TrialInfo(reached=True, address="/ip4/203.0.113.7/tcp/4001"),
            carrier=TrialInfo(reached=True, address="/ip4/203.0.113.7/tcp/4002"),
        ),
    ),
    own=("192.168.1.5",),
    router=RouterInfo(state="forwards", addresses=("/ip4/203.0.113.7/tcp/4002",)),
    local=("192.168.1.5",),
    relaying=RelayingInfo(on=True, members=6, reservations=2),
    daemons=3,
    daemons_relayed=0,
    carriers=2,
    carriers_relayed=0,
    punched=0,
    open_receipts=2,
    pair_receipts=0,
    wanted_receipts=2,
)
"""A node at home that can be dialled."""


def head(height: int) -> Head:
    return Head(
        height=height,
        hash=f"{height:064x}",
        view=height + 2,
        time=time_text(GENESIS_MS + 500 * height),
        proposer=NODES[height % 4],
        transactions=height % 3,
    )


def job_summary(state: str = "active") -> JobSummary:
    return JobSummary(
        id=JOB,
        name="plays-3m",
        state=state,  # type: ignore[arg-type]
        submitter=OWNER,
        height=4211,
        offered=3990,
        family="llama",
        stages=2,
        lanes=1,
        rounds=20,
        steps=200,
        segments_settled=17,
        escrow="2400000",
        spent="714000",
        loss=2_612_000,
    )


def job_detail(state: str = "active") -> JobDetail:
    return JobDetail(
        summary=job_summary(state),
        spec_id="5e" * 32,
        segment_steps=10,
        slots=(
            SlotInfo(
                lane=0,
                stage=0,
                layers=(0, 2),
                worker=NODES[0],
                state="running",
                segment=11,
                settled=9,
                price="31488",
                earned="283392",
                step=114,
            ),
            SlotInfo(
                lane=0,
                stage=1,
                layers=(2, 4),
                worker=NODES[1],
                state="waiting for frames",
                segment=10,
                settled=8,
                price="31488",
                earned="251904",
            ),
        ),
        standbys=(StandbyInfo(node=NODES[2], slots=((0, 0), (0, 1)), proved=8, earned="68000"),),
        audits=(
            AuditInfo(lane=0, stage=0, segment=2, auditor=NODES[2], state="passed", drawn=4050),
            AuditInfo(lane=0, stage=1, segment=4, auditor=NODES[3], state="passed", drawn=4102),
            AuditInfo(lane=0, stage=1, segment=9, auditor=NODES[3], state="committed", drawn=4200),
        ),
        losses=tuple(
            SegmentLoss(lane=0, segment=segment, loss=int(1e6 * (2.2 + 3.3 * 0.75**segment)))
            for segment in range(11)
        ),
        budget="2410000",
        payments={NODES[0]: "283392", NODES[1]: "251904", NODES[2]: "116000", NODES[3]: "48000"},
        deadline=5990,
    )


def job_event(number: int) -> JobEvent:
    return JobEvent(
        job=JOB,
        height=4211 + number,
        time=time_text(GENESIS_MS + 1000 * number),
        kind="segment",
        text=f"segment {number} of stage 0 committed",
        lane=0,
        stage=0,
        segment=number,
        loss=2_600_000 - number,
    )


def node_status(height: int = 4211) -> NodeStatus:
    return NodeStatus(
        version="0.1.0",
        node=NODES[0],
        owner=OWNER,
        session=NODES[3],
        chain="tdmld-local-1",
        chain_id=CHAIN_ID,
        height=height,
        head=f"{height:064x}",
        view=height + 2,
        syncing=False,
        peers=6,
        validator=True,
        balance="1000283392",
        work_stake="50000000",
        vote_stake="100000000",
        reputation=982_000,
        earned="283392",
        pending="62976",
        started=time_text(GENESIS_MS),
        epoch=8,
        weight="100000000",
        next_weight="100000000",
        total_weight="400000000",
        ask=AskInfo(
            price="40",
            device_class="cpu-x86",
            memory=2**31,
            audit_capacity=1,
            standby_slots=2,
            until=5000,
        ),
        tasks=(
            SlotRun(
                job=JOB,
                role="worker",
                lane=0,
                stage=0,
                layers=(0, 2),
                state="running",
                segment=11,
                segments=20,
                step=114,
                steps=200,
                settled=9,
                earned="283392",
                tokens_per_second=912.4,
            ),
        ),
    )


VALIDATORS = (
    ValidatorInfo(owner=OWNER, node=NODES[0], weight="100000000", leads=True, jailed=0),
    ValidatorInfo(owner=OWNER, node=NODES[1], weight="30000000", leads=False, jailed=1000),
)


def stake_info(address: str = OWNER) -> StakeInfo:
    """In epoch 2 of 500 blocks each: one unbonding is over, of one a window, of one none."""
    rows = (
        ("vote", "7", 1, 601, time_text(GENESIS_MS + 260_000), True),
        ("vote", "50", 2, 1101, time_text(GENESIS_MS + 3_600_000), False),
        ("work", "60", 4, 2101, "", False),
    )
    return StakeInfo(
        address=address,
        height=1004,
        time=time_text(GENESIS_MS + 502_000),
        epoch=2,
        epoch_end=1500,
        vote_stake="100000000",
        work_stake="50000000",
        nominee=NODES[0],
        unbonding=tuple(
            UnbondingInfo(
                bucket=bucket,  # type: ignore[arg-type]
                amount=amount,
                epoch=epoch,
                from_height=height,
                after=after,
                ready=ready,
            )
            for bucket, amount, epoch, height, after, ready in rows
        ),
        seats=(
            SeatInfo(epoch=2, node=NODES[0], weight="33", total="133", leads=True),
            SeatInfo(epoch=3, node=NODES[0], weight="40", total="140", leads=False),
        ),
        offences=(OffenceInfo(node=NODES[2], epoch=1, height=777, burned="51"),),
    )


def node_key_info(node: str = NODES[0], **changes: object) -> NodeKeyInfo:
    fields: dict[str, object] = {
        "from_height": 0,
        "nominated": False,
        "epochs": (),
        "asks": False,
        "revoked": 0,
        "convicted": 0,
        "jailed": 0,
    }
    return NodeKeyInfo(node=node, **(fields | changes))  # type: ignore[arg-type]


@dataclass
class FakeBackend:
    """A `Backend`; tests set its fields and look at what it was asked to do."""

    height: int = 3
    status: NodeStatus = field(default_factory=node_status)
    detail: JobDetail = field(default_factory=job_detail)
    balance: int = 1_000_000_000
    nonce: int = 7
    stake: StakeInfo = field(default_factory=stake_info)
    keys: tuple[NodeKeyInfo, ...] = ()
    asks: tuple[AskRow, ...] = ()
    outcome: str = "ok"
    submitted: list[str] = field(default_factory=list)
    published: list[tuple[str, str, str]] = field(default_factory=list)
    banned: dict[str, BanInfo] = field(default_factory=dict)
    stopped: bool = False
    closed_generators: int = 0
    heads_limit: int | None = None
    head_bytes: int = 0
    tick: trio.Event | None = None

    async def node_status(self) -> NodeStatus:
        return self.status

    async def node_earnings(self) -> Earnings:
        return Earnings(
            height=4211,
            total="283392",
            pending="62976",
            jobs=(JobEarnings(job=JOB, worker="283392", standby="0", audit="0", pending="62976"),),
            buckets=tuple(
                EarningsBucket(
                    start=time_text(GENESIS_MS + 60_000 * n), amount=str(31488 * (n * 7 % 5))
                )
                for n in range(30)
            ),
        )

    async def net_reachability(self, refresh: bool = False) -> NetReachability:
        return REACHABILITY

    async def net_peers(self) -> tuple[PeerInfo, ...]:
        return (
            PeerInfo(
                node=NODES[1],
                addresses=("/ip4/127.0.0.1/tcp/4001",),
                connected=True,
                validator=True,
                height=4211,
                round_trip_ms=1.2,
            ),
            PeerInfo(node=NODES[2], addresses=("/ip4/127.0.0.1/tcp/4002",), connected=False),
        )

    async def net_connect(self, address: str) -> Connected:
        if not address.startswith("/ip4/127."):
            raise Refused(f"cannot connect to {NODES[1]}: {address}: Connection refused")
        return Connected(
            node=NODES[1], address="/ip4/127.0.0.1/tcp/4001", path="direct", transport="/tls/1.0.0"
        )

    async def net_bans(self) -> tuple[BanInfo, ...]:
        return tuple(self.banned.values())

    async def net_ban(self, subject: str, seconds: int = 0, reason: str = "") -> BanInfo:
        until = time_text(GENESIS_MS + 1000 * seconds) if seconds else ""
        self.banned[subject] = BanInfo(
            subject=subject, until=until, reason=reason, author="operator"
        )
        return self.banned[subject]

    async def net_unban(self, subject: str) -> BanInfo:
        if subject not in self.banned:
            raise NotFound(f"{subject} is not banned")
        return self.banned.pop(subject)

    async def chain_head(self) -> Head:
        return head(self.height)

    async def chain_block(self, height: int) -> BlockInfo:
        if height > self.height:
            raise NotFound(f"there is no block {height} yet; the head is {self.height}")
        brief = head(height)
        return BlockInfo(
            height=height,
            hash=brief.hash,
            parent=f"{max(height - 1, 0):064x}",
            view=brief.view,
            time=brief.time,
            proposer=brief.proposer,
            state_height=max(height - 1, 0),
            state_root="ab" * 32,
            size=812,
        )

    async def chain_prove(self, kind: str, key: str, checkpoint: int = 0) -> Proof:
        brief = head(self.height)
        return Proof(height=self.height, hash=brief.hash, raw="00")

    async def chain_account(self, address: str) -> AccountInfo:
        return AccountInfo(
            address=address,
            height=self.height,
            balance=str(self.balance),
            nonce=self.nonce,
            vote_stake=self.stake.vote_stake,
            work_stake=self.stake.work_stake,
        )

    async def chain_transaction(self, id: str) -> TransactionStatus:
        if not self.submitted:
            raise NotFound("this transaction was never seen here")
        if self.outcome == "ok":
            return TransactionStatus(id=id, state="ok", height=self.height, block=self.height)
        return TransactionStatus(
            id=id, state="failed", height=self.height, block=self.height, reason=self.outcome
        )

    async def chain_submit(self, raw: str) -> Submitted:
        if len(raw) % 2:
            raise Refused("not whole bytes")
        self.submitted.append(raw)
        return Submitted(id="77" * 32, height=self.height)

    async def chain_parameters(self) -> ChainParameters:
        return ChainParameters(
            chain="tdmld-local-1",
            chain_id=CHAIN_ID,
            height=self.height,
            time=time_text(GENESIS_MS),
            protocol=1,
            parameters={
                "interval_ms": 500,
                "fee_floor": 10,
                "tx_fee": 10,
                "offer_deposit": 10000,
                "match_delay": 4,
                "unbonding": [1000, 3600],
                "epoch_blocks": 500,
                "vote_stake_min": 1,
            },
            epoch=2,
            validators=VALIDATORS,
        )

    async def chain_validators(self, epoch: int = -1) -> ValidatorSetInfo:
        if epoch not in (-1, 2, 3):
            raise NotFound(f"nobody is known to validate in epoch {epoch}")
        wanted = 2 if epoch == -1 else epoch
        return ValidatorSetInfo(
            height=self.height,
            epoch=wanted,
            first=500 * wanted + 1,
            last=500 * (wanted + 1),
            quorum="86666667",
            total="130000000",
            validators=VALIDATORS,
        )

    async def chain_stake(self, address: str) -> StakeInfo:
        return msgspec.structs.replace(self.stake, address=address)

    async def chain_keys(self, address: str) -> tuple[NodeKeyInfo, ...]:
        return self.keys

    async def chain_asks(self) -> tuple[AskRow, ...]:
        return self.asks

    async def chain_subscribe_heads(self) -> AsyncIterator[Head]:
        height = self.height
        try:
            while self.heads_limit is None or height < self.height + self.heads_limit:
                brief = head(height)
                yield brief
                height += 1
                if self.tick is not None:
                    await self.tick.wait()
                else:
                    await trio.lowlevel.checkpoint()
        finally:
            self.closed_generators += 1

    async def job_publish(self, spec: str, text_path: str, name: str, given_path: str) -> Published:
        self.published.append((spec, text_path, name))
        return Published(spec_id="5e" * 32, shards=2, size=1_271_402)

    async def job_list(self) -> tuple[JobSummary, ...]:
        return (self.detail.summary,)

    async def job_status(self, id: str) -> JobDetail:
        if id != JOB:
            raise NotFound(f"this chain has no job {id[:12]}")
        return self.detail

    async def job_subscribe(self, id: str) -> AsyncIterator[JobEvent]:
        if id != JOB:
            raise NotFound(f"this chain has no job {id[:12]}")
        for number in range(3):
            yield job_event(number)

    async def job_fetch(self, id: str, out_dir: str) -> FetchedResult:
        return FetchedResult(
            job=id,
            result_id="9d" * 32,
            directory=out_dir,
            files=(
                ResultFile(name="config.json", size=700),
                ResultFile(name="model.safetensors", size=13_000_000),
            ),
        )

    async def admin_stop(self) -> None:
        self.stopped = True
