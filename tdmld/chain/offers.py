"""Offers: what a job may ask for, and the money that it locks until it ends.

escrow        rounds x (slot_price_max x weight of the lane, of each paid slot, + standby_price of
              each slot): workers and standby
audit budget  named by the offer, at least what its rate draws on average
fees          tx_fee x the most job-bound transactions that can ever succeed
deposit       offer_deposit, against spam: a part burns for each matching, the rest comes back
"""

from dataclasses import dataclass

from msgspec.structs import replace

from tdmld.chain import due, limits
from tdmld.chain.events import JobOffered
from tdmld.chain.execution import Execution, require
from tdmld.chain.genesis import Parameters
from tdmld.chain.records import SPLIT, Due, Job, Timer
from tdmld.chain.transactions import LaneMode, Offer

PRIVACY_MODES = ("open", "sealed", SPLIT)
"""What this version of the protocol can carry."""


@dataclass(frozen=True, slots=True)
class Lock:
    """What an offer locks, in units."""

    escrow: int
    audit_budget: int
    fees: int
    deposit: int

    @property
    def total(self) -> int:
        return self.escrow + self.audit_budget + self.fees + self.deposit


def audits_expected(rate: int, slots: int, rounds: int) -> int:
    """Audits that a rate (parts per million) draws on average, rounded up."""
    return -(-rate * slots * rounds // limits.RATE_ONE)


def suggested_audit_budget(rate: int, slots: int, rounds: int, price: int) -> int:
    """A budget with room for luck and for tainted heights, at which every segment is drawn:
    twice the expected number and four, at most one audit of every segment; 0 at rate 0."""
    if rate == 0:
        return 0
    return price * min(slots * rounds, 2 * audits_expected(rate, slots, rounds) + 4)


def repairs_expected(offer: Offer, parameters: Parameters) -> int:
    """The most transactions that vacancies, rollbacks and accusations can cause: places that are
    asked for, given up and answered, and segments that are made and audited once more."""
    slots = offer.lanes * len(offer.stages)
    redone = slots * offer.unsettled * (limits.INCARNATIONS + limits.ROLLBACKS)
    audits = parameters.audit_redraws + 1 + 2 if offer.audit_rate else 0
    attested = 2 * (offer.lanes - 1) if offer.lane_mode is LaneMode.DILOCO else 0
    return (
        redone * (1 + 2 + audits + attested)  # Commit, StandbyProof, audits, AttestContributions
        + 2 * slots * limits.INCARNATIONS  # Accept or Decline; Leave
        + 3 * slots * limits.STALLS  # Stall, Present, Witness
        + limits.STANDBY_TURNS
        + 1  # Accept or Decline
    )


def transactions_expected(offer: Offer, parameters: Parameters) -> int:
    """The most job-bound transactions that can ever succeed for a job: their fees are locked."""
    slots = offer.lanes * len(offer.stages)
    segments = slots * offer.rounds
    copies = slots * -(-offer.rounds // offer.state_every)
    audits = segments if offer.audit_rate else 0
    return (
        limits.MATCH_TRIES * (slots + 1)  # Accept or Decline
        + 2 * slots  # AttestGenesis
        + segments  # Commit
        + slots * (offer.rounds - 1) * (offer.lanes - 1) * (offer.lane_mode is LaneMode.DILOCO)
        # AttestContributions: each names at least one lane more
        + 2 * copies  # StandbyProof
        + audits * (parameters.audit_redraws + 1 + 2)  # AuditCommit or AuditFail; two openings
        + 2  # AttestResult
        + repairs_expected(offer, parameters)
    )


def paid_weight(offer: Offer) -> int:
    """Slots that are paid, each counted as often as its lane's weight says."""
    own = 1 if offer.privacy == SPLIT else 0
    return sum(offer.lane_weights) * len(offer.stages) - own


def lock_of(offer: Offer, parameters: Parameters) -> Lock:
    """How much an offer takes from the submitter's balance besides its own fee."""
    slots = offer.lanes * len(offer.stages)
    round_price = paid_weight(offer) * offer.slot_price_max + slots * offer.standby_price
    return Lock(
        escrow=offer.rounds * round_price,
        audit_budget=offer.audit_budget,
        fees=parameters.tx_fee * transactions_expected(offer, parameters),
        deposit=parameters.offer_deposit,
    )


def offer(run: Execution, submitter: bytes, job_id: bytes, wanted: Offer) -> None:
    """Open a job and lock its money."""
    check_offer(wanted)
    require(
        run.height < wanted.deadline <= run.height + limits.DEADLINE_BLOCKS,
        f"deadline: must lie between {run.height + 1} and {run.height + limits.DEADLINE_BLOCKS}",
    )
    source = run.state.owner_of(wanted.source)
    require(source is not None, "source: this node key is not registered")
    lock = lock_of(wanted, run.parameters)
    account = run.state.account(submitter)
    missing = lock.total - account.balance
    require(
        missing <= 0,
        f"the offer locks {lock.total} (escrow {lock.escrow}, audits {lock.audit_budget}, fees "
        f"{lock.fees}, deposit {lock.deposit}); {missing} more than the balance of "
        f"{account.balance}",
    )
    run.state.put_account(submitter, replace(account, balance=account.balance - lock.total))
    run.state.put_job(
        Job(
            id=job_id,
            submitter=submitter,
            source=wanted.source,
            source_session=wanted.session,
            spec_id=wanted.spec_id,
            spec_bytes=wanted.spec_bytes,
            stages=wanted.stages,
            lanes=wanted.lanes,
            ring=wanted.ring,
            lane_mode=wanted.lane_mode,
            lane_weights=wanted.lane_weights,
            rounds=wanted.rounds,
            segment_steps=wanted.segment_steps,
            unsettled=wanted.unsettled,
            state_every=wanted.state_every,
            tokens=wanted.tokens,
            class_wanted=wanted.class_id,
            privacy=wanted.privacy,
            slot_price_max=wanted.slot_price_max,
            standby_price=wanted.standby_price,
            audit_rate=wanted.audit_rate,
            audit_price=wanted.audit_price,
            deadline=wanted.deadline,
            escrow=lock.escrow,
            audit_budget=lock.audit_budget,
            fee_budget=lock.fees,
            deposit=lock.deposit,
            offered=run.height,
        )
    )
    due.put(run.state, Due(Timer.MATCH, job_id), run.height + run.parameters.match_delay)
    due.put(run.state, Due(Timer.DEADLINE, job_id), wanted.deadline)
    run.emit(JobOffered(job_id))


def check_offer(wanted: Offer) -> None:
    """The rules that an offer can be judged by alone."""
    _between("spec_bytes", wanted.spec_bytes, 1, limits.SPEC_BYTES)
    _between("lanes", wanted.lanes, 1, limits.LANES)
    _between("lanes x stages", wanted.lanes * len(wanted.stages), 1, limits.SLOTS)
    _between("rounds", wanted.rounds, 1, limits.ROUNDS)
    _between("segment_steps (K)", wanted.segment_steps, 1, limits.SEGMENT_STEPS)
    _between("unsettled (D)", wanted.unsettled, 1, limits.UNSETTLED)
    _between("state_every (R)", wanted.state_every, 1, limits.UNSETTLED)
    require(
        2 * wanted.state_every <= wanted.unsettled,
        f"state_every (R) is {wanted.state_every} and unsettled (D) {wanted.unsettled}: "
        "2 R must not exceed D",
    )
    _between("tokens", wanted.tokens, 1, limits.SEGMENT_TOKENS)
    for stage in wanted.stages:
        _between("parameters of a stage", stage.parameters, 1, limits.PARAMETERS)
        _between("memory of a stage", stage.memory, 1, limits.MEMORY_BYTES)
    _check_lanes(wanted)
    require(wanted.class_id != "", 'class: name one, or "any"')
    require(
        wanted.privacy in PRIVACY_MODES,
        f"privacy {wanted.privacy!r}: this protocol version knows {', '.join(PRIVACY_MODES)}",
    )
    _between("slot_price_max", wanted.slot_price_max, 0, limits.PRICE)
    _between("standby_price", wanted.standby_price, 0, limits.PRICE)
    _between("audit_rate", wanted.audit_rate, 0, limits.RATE_ONE)
    require(
        wanted.audit_price > 0 or wanted.audit_budget == 0,
        "audit_price: 0 buys no audits; set a price, or a budget of 0",
    )
    expected = audits_expected(wanted.audit_rate, paid_weight(wanted), wanted.rounds)
    require(
        wanted.audit_price > 0 or wanted.audit_rate == 0, "audit_price: audits are not for free"
    )
    require(
        wanted.audit_budget >= expected * wanted.audit_price,
        f"audit_budget: the rate draws {expected} audits on average, which cost "
        f"{expected * wanted.audit_price}",
    )


def _check_lanes(wanted: Offer) -> None:
    """What lanes, ring and privacy ask of each other."""
    require(
        (wanted.lane_mode is LaneMode.SINGLE) == (wanted.lanes == 1),
        f"lane_mode: {wanted.lane_mode} with lanes = {wanted.lanes}; single goes with 1 lane",
    )
    require(len(wanted.lane_weights) == wanted.lanes, "lane_weights: one for each lane")
    for weight in wanted.lane_weights:
        _between("weight of a lane", weight, 1, limits.LANE_WEIGHT)
    require(not wanted.ring or len(wanted.stages) > 1, "ring: it takes two stages or more")
    require(
        wanted.privacy != SPLIT or (wanted.ring and wanted.lanes == 1),
        "privacy split: the source holds both ends of a ring of one lane",
    )
    require(
        wanted.lane_mode is not LaneMode.DILOCO or wanted.rounds > 1,
        "rounds: lane mode diloco takes two or more, for the last one only closes",
    )


def _between(name: str, value: int, low: int, high: int) -> None:
    require(low <= value <= high, f"{name} is {value}: must lie between {low} and {high}")
