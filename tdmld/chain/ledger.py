"""The state transition: what one finalized block does.

    apply_block = views that were passed over count against their leaders, and taint the height
                + due entries of this height and before (at most due_per_block), by the state that
                  the parent left and this block's beacon
                + transactions, in the block's order
                + at the end of an epoch: who was absent, the validators of the one after the next
                + the sum of all money is what genesis made it

Due entries come first, so that a leader, who knows the block's beacon when it chooses the block's
transactions, can change nothing about what that beacon draws over; and a transaction in the block
in which its window ends is too late.

An owner transaction that cannot pay, or has another nonce than the next one, does nothing; one
whose effect breaks a rule pays its fee and uses its nonce. Signatures are checked by whoever admits
transactions and notarizes blocks, not here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
from msgspec.structs import replace

from tdmld.chain import (
    audits,
    due,
    epochs,
    jail,
    jobs,
    limits,
    market,
    offers,
    replacement,
    rounds,
    segments,
    slashing,
    stalls,
)
from tdmld.chain.accounts import (
    Account,
    Supply,
    Unbondings,
)
from tdmld.chain.codec import decode
from tdmld.chain.complaints import (
    Leave,
    Present,
    Stall,
    Witness,
)
from tdmld.chain.crypto import verify
from tdmld.chain.errors import InvalidTransaction, InvariantViolation
from tdmld.chain.events import Event
from tdmld.chain.execution import BlockContext, Execution, known_job, require
from tdmld.chain.genesis import Genesis, node_owners
from tdmld.chain.genesis import supply as genesis_supply
from tdmld.chain.records import (
    Due,
    Job,
    Node,
    Timer,
)
from tdmld.chain.state import SUPPLY_KEY, State
from tdmld.chain.transactions import (
    EVIDENCE_KINDS,
    FREE_KINDS,
    OWNER_KINDS,
    REGISTER_DOMAIN,
    Accept,
    Ask,
    AttestContributions,
    AttestGenesis,
    AttestResult,
    AuditCommit,
    AuditFail,
    AuditOpen,
    Bond,
    Commit,
    Decline,
    Fetched,
    Nominate,
    Offer,
    Open,
    Payload,
    ProposalEvidence,
    Register,
    Return,
    Revoke,
    StandbyProof,
    Transaction,
    Transfer,
    Unbond,
    VoteEvidence,
    Withdraw,
    registration_bytes,
)

__all__ = [
    "BlockContext",
    "BlockResult",
    "Receipt",
    "apply_block",
    "check_transaction",
    "genesis_changes",
    "next_due",
    "recount",
]

Get = Callable[[bytes], bytes | None]


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What became of one transaction; `reason` says which rule it broke, empty when `ok`."""

    id: bytes
    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BlockResult:
    """`changes`: key -> new value, or None for deleted; what the store writes, by ascending key."""

    changes: dict[bytes, bytes | None]
    receipts: tuple[Receipt, ...]
    events: tuple[Event, ...]


def genesis_changes(genesis: Genesis) -> dict[bytes, bytes]:
    """The state at height 0."""
    state = State(lambda _: None)
    state.write(SUPPLY_KEY, Supply(genesis_supply(genesis), 0, 0, 0, 0, 0))
    for owner, amount in genesis.accounts:
        state.put_account(owner, replace(state.account(owner), balance=amount))
    for validator in genesis.validators:
        account = state.account(validator.owner)
        stake = account.vote_stake + validator.stake
        state.put_account(validator.owner, replace(account, vote_stake=stake))
    for owner, amount in genesis.work_stakes:
        state.put_account(owner, replace(state.account(owner), work_stake=amount))
    for node, owner in sorted(node_owners(genesis).items()):
        state.put_node(node, Node(owner, 0))
    epochs.found(state, genesis)
    _check_supply(state.supply)
    return {key: value for key, value in state.changes.items() if value is not None}


def apply_block(
    get: Get, genesis: Genesis, context: BlockContext, transactions: Sequence[Transaction]
) -> BlockResult:
    """Execute one finalized block over the state that `get` reads. Pure; see the module's head.

    Raises InvariantViolation when the rules contradict themselves: the node must stop.
    """
    run = Execution(State(get), genesis, context)
    jail.count(run)
    if context.tainted:
        run.state.put_last_tainted(context.height)
    for _ in range(genesis.parameters.due_per_block):
        entry = due.take(run.state, context.height)
        if entry is None:
            break
        _DUE[entry.timer](run, entry)
    receipts = tuple(_execute(run, transaction) for transaction in transactions)
    epochs.close(run)
    _check_supply(run.state.supply)
    return BlockResult(run.state.changes, receipts, tuple(run.events))


def next_due(get: Get) -> int | None:
    """The lowest height at which something is due: until then the chain must make blocks."""
    return due.lowest(State(get))


def check_transaction(
    state: State, genesis: Genesis, height: int, transaction: Transaction, time_ms: int = 0
) -> State:
    """Try `transaction` as part of the block `height`; return the state after it.

    `state` is left as it is. `time_ms`: that of the head, for what waits for a time. For pools and
    wallets: says before anything is sent whether it would succeed now. Raises InvalidTransaction
    with the broken rule.
    """
    run = Execution(state.fork(), genesis, _trial_context(height, time_ms))
    if transaction.by_owner:
        _charge(run, transaction)
    _effect(run, transaction)
    return run.state


@lru_cache(maxsize=4)
def _trial_context(height: int, time_ms: int) -> BlockContext:
    return BlockContext(height, height, height - 1, time_ms, bytes(32), bytes(32))


def _execute(run: Execution, transaction: Transaction) -> Receipt:
    try:
        if transaction.by_owner:
            _charge(run, transaction)
        child = run.fork()
        _effect(child, transaction)
    except InvalidTransaction as error:
        return Receipt(transaction.id, False, str(error))
    run.merge(child)
    return Receipt(transaction.id, True, "")


def _charge(run: Execution, transaction: Transaction) -> None:
    """Take an owner's fee and use its nonce, or raise without doing anything."""
    _check_expiry(run, transaction)
    floor = run.parameters.fee_floor
    require(transaction.fee >= floor, f"fee: {transaction.fee}; at least {floor} is asked for")
    account = run.state.account(transaction.signer)
    require(
        transaction.nonce == account.nonce,
        f"nonce: {transaction.nonce}; the signer's next one is {account.nonce}",
    )
    require(
        account.balance >= transaction.fee,
        f"the balance of {account.balance} does not cover the fee of {transaction.fee}",
    )
    paid = replace(account, nonce=account.nonce + 1, balance=account.balance - transaction.fee)
    run.state.put_account(transaction.signer, paid)
    run.state.burn(transaction.fee)


def _check_expiry(run: Execution, transaction: Transaction) -> None:
    require(
        transaction.expiry == 0 or run.height <= transaction.expiry,
        f"expired at height {transaction.expiry}: sign it again",
    )


def _effect(run: Execution, transaction: Transaction) -> None:
    """What the payload does; a node transaction's fee is taken from its job first."""
    payload, signer = transaction.payload, transaction.signer
    if not transaction.by_owner:
        _check_expiry(run, transaction)
        require(
            transaction.nonce == 0 and transaction.fee == 0,
            "a node's transaction has nonce 0 and fee 0: its job pays for it",
        )
        if not isinstance(payload, EVIDENCE_KINDS):
            node = run.state.node(signer)
            revoked = 0 if node is None else node.revoked
            require(not revoked, f"this node key was revoked at height {revoked}")
        if not isinstance(payload, FREE_KINDS):
            _burn_job_fee(run, payload)
    match payload:
        case Transfer():
            _transfer(run, signer, payload)
        case Bond():
            _bond(run, signer, payload)
        case Unbond():
            epochs.unbond(run, signer, payload)
        case Withdraw():
            epochs.withdraw(run, signer)
        case Nominate():
            epochs.nominate(run, signer, payload)
        case Revoke():
            epochs.revoke(run, signer, payload)
        case VoteEvidence() | ProposalEvidence():
            slashing.convict(run, payload, transaction.chain_id)
        case Register():
            _register(run, signer, payload, transaction.chain_id)
        case Offer():
            offers.offer(run, signer, transaction.id, payload)
        case Fetched():
            jobs.fetched(run, signer, payload)
        case Return():
            jail.return_(run, signer, payload)
        case Ask():
            market.ask(run, signer, payload, transaction.chain_id)
        case Accept():
            replacement.accept(run, signer, payload)
        case Decline():
            replacement.decline(run, signer, payload)
        case AttestGenesis():
            jobs.attest_genesis(run, signer, payload)
        case Commit():
            segments.commit(run, signer, payload)
        case AttestContributions():
            rounds.attest(run, signer, payload)
        case StandbyProof():
            segments.standby_proof(run, signer, payload)
        case AuditCommit():
            audits.audit_commit(run, signer, payload)
        case AuditFail():
            audits.audit_fail(run, signer, payload)
        case Open():
            audits.open_seal(run, signer, payload)
        case AuditOpen():
            audits.audit_open(run, signer, payload)
        case AttestResult():
            jobs.attest_result(run, signer, payload)
        case Leave():
            stalls.leave(run, signer, payload)
        case Stall():
            stalls.stall(run, signer, payload)
        case Present():
            stalls.present(run, signer, payload)
        case Witness():
            stalls.witness(run, signer, payload)


_DUE: dict[Timer, Callable[[Execution, Due], None]] = {
    Timer.MATCH: market.match,
    Timer.ACCEPT: market.accept_over,
    Timer.ACTIVATE: jobs.activate_over,
    Timer.DEADLINE: jobs.deadline,
    Timer.STALL: stalls.window_over,
    Timer.KEY: segments.proof_key,
    Timer.DRAW: audits.draw,
    Timer.AUDIT: audits.audit_over,
    Timer.SETTLE: replacement.settle,
    Timer.RESULT: jobs.result_over,
    Timer.ROUND: rounds.over,
    Timer.REPLACE: replacement.replace_over,
    Timer.STANDBY: replacement.standby_over,
    Timer.CASE: stalls.case_over,
}


def _burn_job_fee(run: Execution, payload: Payload) -> None:
    if isinstance(payload, (*OWNER_KINDS, *FREE_KINDS)):
        raise InvariantViolation("no job pays for this kind")
    job = known_job(run, payload.job)
    require(not job.final, f"the job is over: {job.status}")
    fee = run.parameters.tx_fee
    if job.fee_budget < fee:
        raise InvariantViolation("a job's locked fees do not cover its transactions")
    run.state.put_job(replace(job, fee_budget=job.fee_budget - fee))
    run.state.burn(fee)


def _transfer(run: Execution, signer: bytes, wanted: Transfer) -> None:
    require(wanted.amount > 0, "amount: must be greater than 0")
    account = run.state.account(signer)
    require(
        account.balance >= wanted.amount,
        f"the balance of {account.balance} is {wanted.amount - account.balance} short",
    )
    run.state.put_account(signer, replace(account, balance=account.balance - wanted.amount))
    to = run.state.account(wanted.to)
    run.state.put_account(wanted.to, replace(to, balance=to.balance + wanted.amount))


def _bond(run: Execution, signer: bytes, wanted: Bond) -> None:
    require(wanted.amount > 0, "amount: must be greater than 0")
    account = run.state.account(signer)
    require(
        account.balance >= wanted.amount,
        f"the balance of {account.balance} is {wanted.amount - account.balance} short",
    )
    account = replace(account, balance=account.balance - wanted.amount)
    if wanted.bucket == "vote":
        account = replace(account, vote_stake=account.vote_stake + wanted.amount)
    elif wanted.bucket == "work":
        account = replace(account, work_stake=account.work_stake + wanted.amount)
    else:
        raise InvalidTransaction(f"bucket {wanted.bucket!r}: must be vote or work")
    run.state.put_account(signer, account)


def _register(run: Execution, signer: bytes, wanted: Register, chain_id: bytes) -> None:
    message = registration_bytes(signer, wanted.from_height)
    require(
        verify(wanted.node, REGISTER_DOMAIN, chain_id, message, wanted.proof),
        "proof: not the node key's signature over this owner and from_height",
    )
    require(wanted.node != signer, "node: must be another key than the owner's")
    require(
        run.state.node(wanted.node) is None, "this node key is bound already; keys are not reused"
    )
    require(
        run.height < wanted.from_height <= run.height + limits.DEADLINE_BLOCKS,
        f"from_height: must lie between {run.height + 1} and {run.height + limits.DEADLINE_BLOCKS}",
    )
    run.state.put_node(wanted.node, Node(signer, wanted.from_height))


def _check_supply(supply: Supply) -> None:
    parts = (
        supply.balances,
        supply.stakes,
        supply.unbonding,
        supply.escrows,
        supply.burned,
    )
    if sum(parts) != supply.genesis or min(parts) < 0:
        raise InvariantViolation(f"money is not conserved: {supply}")


def recount(items: Iterable[tuple[bytes, bytes]]) -> Supply:
    """Count all money in a whole state (every key and value of it), and compare with the record.

    Raises InvariantViolation where they differ. For tests and exported ledgers.
    """
    balances = stakes = unbonding = escrows = 0
    recorded = Supply(0, 0, 0, 0, 0, 0)
    for key, value in items:
        if key[:1] == b"a":
            account = decode(Account, value, limits.RECORD_BYTES)
            balances += account.balance
            stakes += account.vote_stake + account.work_stake
        elif key[:1] == b"b":
            unbonding += decode(Unbondings, value, limits.RECORD_BYTES).total
        elif key[:1] == b"j":
            escrows += decode(Job, value, limits.RECORD_BYTES).locked
        elif key == SUPPLY_KEY:
            recorded = decode(Supply, value, limits.RECORD_BYTES)
    counted = Supply(recorded.genesis, balances, stakes, unbonding, escrows, recorded.burned)
    if counted != recorded:
        raise InvariantViolation(f"counted {counted}, recorded {recorded}")
    _check_supply(counted)
    return counted
