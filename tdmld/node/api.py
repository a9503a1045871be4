"""Answers the RPC from the finalized state; implements `tdmld.rpc.backend.Backend`."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from tdmld import __version__, files, keys
from tdmld.chain.blocks import block_hash
from tdmld.chain.crypto import KeyPair, address, public_key
from tdmld.chain.errors import ChainError, DecodeError, InvalidTransaction
from tdmld.chain.genesis import Genesis, chain_id, protocol_at
from tdmld.chain.light import bundle_bytes
from tdmld.chain.records import Job
from tdmld.chain.reputation import reputation
from tdmld.chain.state import State
from tdmld.chain.transactions import decode_transaction
from tdmld.errors import UserError
from tdmld.node import provenance, stakes, views
from tdmld.node.agent import Agent
from tdmld.node.chainerrors import NotProvable, ServiceBusy, SpecUnavailable, StoreError
from tdmld.node.chainservice import ChainService
from tdmld.node.duties import assigned
from tdmld.node.errors import ContentRefused, MachineError
from tdmld.node.jobbook import JobBook
from tdmld.node.jobfeed import JobFeed
from tdmld.node.jobreports import JobReports
from tdmld.node.machine import Machine, StepDone
from tdmld.node.netapi import NetApi
from tdmld.node.peers import PeerService
from tdmld.node.publish import publish, readable_spec
from tdmld.node.reachapi import ReachApi
from tdmld.node.store import ChainStore
from tdmld.node.work import Work
from tdmld.p2p import Host
from tdmld.rpc.errors import InvalidParams, NotFound, NotReady, Refused
from tdmld.rpc.nettypes import BanInfo, Connected
from tdmld.rpc.reachtypes import NetReachability
from tdmld.rpc.staketypes import AskRow, NodeKeyInfo, StakeInfo, ValidatorSetInfo
from tdmld.rpc.types import (
    AccountInfo,
    AskInfo,
    BlockInfo,
    ChainParameters,
    Earnings,
    FetchedResult,
    Head,
    JobDetail,
    JobEvent,
    JobSummary,
    NodeStatus,
    PeerInfo,
    Proof,
    Published,
    ResultFile,
    Submitted,
    TransactionLine,
    TransactionStatus,
    time_text,
)

log = logging.getLogger(__name__)

FINAL_JOBS_SHOWN = 200
NODES_AT_ONCE = 500
"""Node records looked at before others have their turn: about a millisecond's work."""


@dataclass
class Api:
    """One node's answers. `run` follows the chain and must be running."""

    key: KeyPair
    genesis: Genesis
    host: Host
    chain: ChainService
    store: ChainStore
    machine: Machine
    agent: Agent
    peers: PeerService
    reach: ReachApi
    data_dir: Path
    stop: trio.Event
    started: str = ""

    def __post_init__(self) -> None:
        self.started = time_text(int(self.peers.now_ms()))
        self._chain_id = chain_id(self.genesis)
        self._book = JobBook(self.store, self.genesis, self.data_dir)
        self._feed = JobFeed()
        self._reports = JobReports(
            self.host, self.key.public, self._chain_id, self.chain.state, self.agent.progress
        )
        self._work = Work(self.key.public, self.chain, self.agent, self.host, self._book)
        self.net = NetApi(
            self.host, self.peers, self.chain, self.machine, self.key.address, self.data_dir
        )
        self.agent.on_step = self._step

    async def run(self) -> None:
        """Follow the chain for what this node's owner earns and for whoever follows a job."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reports.run)
            await self._follow()

    async def _follow(self) -> None:
        with closing(self.chain.heads()) as heads:
            async for applied in heads:
                try:
                    self._work.count_income(applied, self._owner())
                    self._feed.tell(self.chain.state(), applied)
                except StoreError:
                    raise
                except Exception:
                    # What people are shown of a block must not end the node.
                    log.exception("block %d cannot be shown", applied.height)

    # the node --------------------------------------------------------------------------------

    async def node_status(self) -> NodeStatus:
        state, owner = self.chain.state(), self._owner()
        account, facts = state.account(owner), state.facts(owner)
        ask = state.ask(self.key.public)
        jobs = self._active(state)
        tasks = tuple(run for job in jobs for run in self._work.tasks(state, job, owner))
        head, epoch = self.store.head, self.chain.committee.epoch
        weight, next_weight, total = stakes.weights(state, self.key.public, epoch)
        return NodeStatus(
            version=__version__,
            node=self.key.address,
            owner=address(owner),
            session=self.machine.session,
            chain=self.genesis.chain,
            chain_id=self._chain_id.hex(),
            height=head.height,
            head=head.hash.hex(),
            view=self.chain.view,
            syncing=self.chain.syncing,
            peers=len(self.host.connected()),
            validator=self.chain.validating,
            balance=str(account.balance),
            work_stake=str(account.work_stake),
            vote_stake=str(account.vote_stake),
            reputation=reputation(facts),
            earned=str(facts.earned),
            pending=str(sum(self._work.pending(state, job, owner) for job in jobs)),
            started=self.started,
            ask=None
            if ask is None
            else AskInfo(
                price=str(ask.price),
                device_class=ask.class_id,
                memory=ask.memory,
                audit_capacity=ask.audit_capacity,
                standby_slots=ask.standby_slots,
                until=ask.until_height,
                open=ask.open,
                paths=tuple(map(address, ask.paths)),
            ),
            epoch=epoch,
            weight=str(weight),
            next_weight=str(next_weight),
            total_weight=str(total),
            tasks=tasks,
            why_not_earning="" if tasks else self._work.why_not_earning(state, jobs),
        )

    async def node_earnings(self) -> Earnings:
        state = self.chain.state()
        return self._work.earnings(state, self._all(state), self._owner())

    async def net_peers(self) -> tuple[PeerInfo, ...]:
        return await self.net.peers()

    async def net_reachability(self, refresh: bool = False) -> NetReachability:
        return await self.reach.reachability(refresh=refresh)

    async def net_connect(self, address: str) -> Connected:
        return await self.net.connect(address)

    async def net_bans(self) -> tuple[BanInfo, ...]:
        return await self.net.bans()

    async def net_ban(self, subject: str, seconds: int = 0, reason: str = "") -> BanInfo:
        return await self.net.ban(subject, seconds, reason)

    async def net_unban(self, subject: str) -> BanInfo:
        return await self.net.unban(subject)

    async def admin_stop(self) -> None:
        self.stop.set()

    # the chain -------------------------------------------------------------------------------

    async def chain_head(self) -> Head:
        head = self.store.head
        block = self.store.block(head.height)
        return Head(
            height=head.height,
            hash=head.hash.hex(),
            view=head.view,
            time=time_text(head.header.time_ms),
            proposer=address(head.header.proposer),
            transactions=0 if block is None else len(block.transactions),
        )

    async def chain_subscribe_heads(self) -> AsyncIterator[Head]:
        with closing(self.chain.heads()) as heads:
            yield await self.chain_head()
            async for applied in heads:
                header = applied.block.header
                yield Head(
                    height=applied.height,
                    hash=applied.hash.hex(),
                    view=header.view,
                    time=time_text(header.time_ms),
                    proposer=address(header.proposer),
                    transactions=len(applied.block.transactions),
                )

    async def chain_block(self, height: int) -> BlockInfo:
        block = self.store.block(height)
        if block is None:
            gone = 0 < height < self.store.lowest
            raise NotFound(
                f"no block {height}: the head is {self.store.height}"
                + (" (genesis has no block)" if height == 0 else "")
                + (f", and this node has those from {self.store.lowest} on" if gone else "")
            )
        lines = []
        for raw in block.transactions:
            tx = decode_transaction(raw, self._chain_id)
            receipt = self.store.receipt(tx.id)
            lines.append(
                TransactionLine(
                    id=tx.id.hex(),
                    kind=type(tx.payload).__name__,
                    signer=address(tx.signer),
                    ok=receipt is not None and receipt.ok,
                    reason="" if receipt is None else receipt.reason,
                )
            )
        header = block.header
        return BlockInfo(
            height=height,
            hash=block_hash(header).hex(),
            parent=header.parent.hex(),
            view=header.view,
            time=time_text(header.time_ms),
            proposer=address(header.proposer),
            state_height=header.state_height,
            state_root=header.state_root.hex(),
            size=len(msgspec.msgpack.encode(block)),
            transactions=tuple(lines),
        )

    async def chain_account(self, address: str) -> AccountInfo:
        return views.account(self.chain.state(), _key(address), self.chain.height)

    async def chain_validators(self, epoch: int = -1) -> ValidatorSetInfo:
        state, now = self.chain.state(), self.chain.committee.epoch
        wanted = now if epoch == -1 else epoch
        found = None
        if 0 <= wanted <= now + 1:
            found = stakes.validator_set(state, self.genesis, wanted, self.chain.height)
        if found is None:
            raise NotFound(
                f"nobody is known to validate in epoch {epoch}: this is epoch {now}, and "
                f"validators are fixed up to epoch {now + 1}"
            )
        return found

    async def chain_stake(self, address: str) -> StakeInfo:
        owner, head = _key(address), self.store.head
        return stakes.stake(
            self.chain.state(),
            self.genesis,
            owner,
            head.height,
            head.header.time_ms,
            self.store.state_items(stakes.offences_of(owner)),
        )

    async def chain_keys(self, address: str) -> tuple[NodeKeyInfo, ...]:
        owner, found = _key(address), []
        for number, (key, raw) in enumerate(self.store.state_items(stakes.NODES), 1):
            if stakes.owned_by(owner, raw):
                found.append(key[1:])
            if number % NODES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return stakes.keys(self.chain.state(), self.genesis, owner, self.chain.height, found)

    async def chain_asks(self) -> tuple[AskRow, ...]:
        return stakes.asks(self.chain.state(), self.chain.height)

    async def chain_transaction(self, id: str) -> TransactionStatus:
        receipt = self.store.receipt(bytes.fromhex(id))
        if receipt is None:
            if not self.chain.is_pending(bytes.fromhex(id)):
                raise NotFound(f"no transaction {id} waits here or stands in a block")
            return TransactionStatus(id=id, state="pending", height=self.chain.height)
        return TransactionStatus(
            id=id,
            state="ok" if receipt.ok else "failed",
            height=self.chain.height,
            block=receipt.height,
            reason=receipt.reason,
        )

    async def chain_submit(self, raw: str) -> Submitted:
        try:
            tx_id = await self.chain.submit(bytes.fromhex(raw))
        except (InvalidTransaction, DecodeError) as error:
            raise Refused(str(error)) from error
        except ServiceBusy as error:
            raise NotReady(str(error)) from error
        return Submitted(id=tx_id.hex(), height=self.chain.height)

    async def chain_prove(self, kind: str, key: str, checkpoint: int = 0) -> Proof:
        try:
            bundle = await self.chain.prove(kind, key, max(checkpoint, 0))
        except DecodeError as error:
            raise InvalidParams(str(error)) from error
        except NotProvable as error:
            raise NotFound(str(error)) from error
        last = bundle.headers[-1]
        return Proof(
            height=last.height, hash=block_hash(last).hex(), raw=bundle_bytes(bundle).hex()
        )

    async def chain_parameters(self) -> ChainParameters:
        parameters, state = self.genesis.parameters, self.chain.state()
        values = {
            name: list(value) if isinstance(value := getattr(parameters, name), tuple) else value
            for name in type(parameters).__struct_fields__
        }
        return ChainParameters(
            chain=self.genesis.chain,
            chain_id=self._chain_id.hex(),
            height=self.chain.height,
            time=time_text(self.genesis.time_ms),
            protocol=protocol_at(self.genesis, self.chain.height),
            parameters=values,
            epoch=self.chain.committee.epoch,
            validators=views.validators(state, self.chain.committee.epoch),
        )

    # jobs ------------------------------------------------------------------------------------

    async def job_publish(
        self, spec: str, text_path: str, name: str = "", given_path: str = ""
    ) -> Published:
        self.agent.published(readable_spec(spec)[1])
        found = await publish(self.machine, self.chain, spec, text_path, given_path, self.data_dir)
        if name:
            self._book.remember_name(found.spec_id, name)
        return found

    async def job_list(self) -> tuple[JobSummary, ...]:
        state = self.chain.state()
        jobs = sorted(self._all(state), key=lambda job: (-job.offered, job.id))
        return tuple(
            views.summary(
                state,
                job,
                self.chain.height,
                spec=self._book.spec(job),
                name=self._book.name(job),
                lock=self._book.lock(job)[0],
            )
            for job in jobs
        )

    async def job_status(self, id: str) -> JobDetail:
        reports = await self._reports.of(self._job(self.chain.state(), id).id)
        state = self.chain.state()
        job = self._job(state, id)
        lock, deposit = self._book.lock(job)
        return views.detail(
            state,
            job,
            self.chain.height,
            spec=self._book.spec(job),
            name=self._book.name(job),
            lock=lock,
            deposit=deposit,
            reports=reports,
        )

    async def job_subscribe(self, id: str) -> AsyncIterator[JobEvent]:
        job = self._job(self.chain.state(), id)
        if job.final:
            return
        async with aclosing(self._feed.follow(job.id)) as events:
            async for event in events:
                yield event

    def _step(self, step: StepDone) -> None:
        self._feed.step(step, self.chain.height, self.peers.now_ms())

    async def job_fetch(self, id: str, out_dir: str) -> FetchedResult:
        state = self.chain.state()
        job = self._job(state, id)
        if not job.result:
            raise Refused(
                f"job {id} has no result: it is {job.status}"
                + (f" ({job.detail or job.reason})" if job.final else ", come back later")
            )
        holders = {node for node, result in job.results if result == job.result}
        members = [slot.worker for slot in assigned(state, job)]
        if job.standby is not None:
            members.append(job.standby)
        sessions = [address(member.session) for member in members if member.node in holders]
        out = Path(out_dir)
        try:
            spec = await self.chain.fetch_spec(job.spec_id)
            result = await self.machine.fetch_result(job.id, spec, job.result, sessions, out)
        except ContentRefused as error:
            raise Refused(str(error)) from error
        except (MachineError, SpecUnavailable, OSError) as error:
            raise NotReady(f"the result cannot be fetched now: {error}") from error
        content = provenance.document(
            state, job, self.genesis.chain, self._chain_id, self.chain.height, spec
        )
        signed = provenance.sign(self.key, self._chain_id, content)
        try:
            files.write_file(result.directory / "provenance.json", signed)
        except OSError as error:
            raise NotReady(f"the model is in {out}, its provenance not: {error}") from error
        rows = (*result.files, ("provenance.json", len(signed)))
        return FetchedResult(
            job=id,
            result_id=job.result.hex(),
            directory=str(result.directory),
            files=tuple(ResultFile(name=name, size=size) for name, size in rows),
        )

    # small things ----------------------------------------------------------------------------

    def _owner(self) -> bytes:
        """Who owns this node: by the chain, else by the key file here, else the node itself."""
        owner = self.chain.state().owner_of(self.key.public)
        if owner is not None:
            return owner
        try:
            return public_key(keys.owner_address(self.data_dir / "keys" / "owner.json"))
        except (UserError, DecodeError):
            return self.key.public

    def _active(self, state: State) -> list[Job]:
        found = (state.job(job_id) for job_id in state.active_jobs())
        return [job for job in found if job is not None]

    def _all(self, state: State) -> list[Job]:
        jobs = self._active(state)
        for job in state.final_jobs():
            if len(jobs) >= FINAL_JOBS_SHOWN:
                break
            jobs.append(job)
        return jobs

    def _job(self, state: State, text: str) -> Job:
        job = state.job(bytes.fromhex(text))
        if job is None:
            raise NotFound(f"no job {text} on this chain (as of block {self.chain.height})")
        return job


def _key(text: str) -> bytes:
    try:
        return public_key(text)
    except ChainError as error:
        raise InvalidParams(f"address: {error}") from error
