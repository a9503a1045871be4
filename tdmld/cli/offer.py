"""From a job file to an offer: what it will say on the chain and what it will lock."""

from pathlib import Path

from tdmld.chain.crypto import public_key
from tdmld.chain.genesis import Parameters
from tdmld.chain.offers import Lock, lock_of, suggested_audit_budget
from tdmld.chain.transactions import Offer
from tdmld.cli.exits import Exit
from tdmld.cli.text import size, units
from tdmld.errors import UserError
from tdmld.node.offers import lane_mode, offered_stages
from tdmld.rpc.types import ChainParameters, NodeStatus
from tdmld.train.budget import stage_disk
from tdmld.train.errors import SpecError
from tdmld.train.jobfile import JobFile, load_job_file
from tdmld.train.spec import spec_id

_PRIVACY = {
    "open": "the text lies readable on the disks of this job's members",
    "sealed": "only this job's members can read the text",
    "split": "text and labels stay on this node, which works in stage 0 itself, for nothing",
}


def read_job_file(path: Path) -> JobFile:
    """The checked job file; UserError names the field that is wrong and the remedy."""
    try:
        return load_job_file(path)
    except SpecError as error:
        raise UserError(
            f"{path}: {error.field}: {error.problem}", next=error.remedy, exit_code=Exit.USAGE
        ) from error


def make_offer(job: JobFile, status: NodeStatus) -> Offer:
    """The offer of `job` through the node of `status`, whose carrier will serve the data."""
    spec, money = job.spec, job.money
    return Offer(
        spec_id=spec_id(job.raw),
        spec_bytes=len(job.raw),
        stages=offered_stages(spec),
        lanes=spec.lanes,
        rounds=spec.rounds,
        segment_steps=spec.pipeline.segment_steps,
        unsettled=spec.pipeline.unsettled,
        state_every=spec.pipeline.state_every,
        tokens=spec.tokens_per_segment,
        class_id=spec.class_,
        privacy=spec.privacy,
        slot_price_max=money.slot_price_max,
        standby_price=money.standby_price,
        audit_rate=money.audit_rate,
        audit_price=money.audit_price,
        audit_budget=suggested_audit_budget(
            money.audit_rate, spec.slots, spec.rounds, money.audit_price
        ),
        deadline=status.height + money.deadline_blocks,
        source=public_key(status.node),
        session=public_key(status.session),
        ring=spec.is_ring,
        lane_mode=lane_mode(spec),
        lane_weights=spec.lane_weights,
    )


def lock(offer: Offer, rules: ChainParameters) -> Lock:
    """What the offer will take from the balance, by this chain's rules."""
    known = set(Parameters.__struct_fields__)
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in rules.parameters.items()
        if name in known
    }
    return lock_of(offer, Parameters(**values))  # type: ignore[arg-type]  # names from the node


def estimate(job: JobFile, offer: Offer, locked: Lock, fee: int) -> list[str]:
    """Lines that say what the job is and what it may cost at most."""
    spec = job.spec
    lines = [
        f"{job.name}: {spec.train.steps} steps in {spec.rounds} segments, "
        f"{spec.stages} stages x {spec.lanes} lanes, {spec.data.tokens:,} tokens of text, "
        f"spec of {len(job.raw):,} bytes"
    ]
    lines.append(f"  privacy {spec.privacy}: {_PRIVACY[spec.privacy]}")
    for stage, needed in enumerate(offer.stages):
        first, last = spec.layers(stage)
        lines.append(
            f"  stage {stage}  layers {first}-{last - 1}  "
            f"{needed.parameters:>12,} parameters  "
            f"{size(needed.memory):>10} memory  {size(stage_disk(spec, stage)):>10} disk"
        )
    rows = [
        ("slots and standby", locked.escrow),
        ("audits", locked.audit_budget),
        ("transaction fees", locked.fees),
        ("deposit (9/10 back)", locked.deposit),
        ("fee of the offer", fee),
    ]
    lines += [f"  {name:<20}{units(amount):>18}" for name, amount in rows]
    lines.append(f"  {'locked at most':<20}{units(locked.total + fee):>18}; unused money returns")
    return lines


def check_funds(locked: Lock, fee: int, balance: int, address: str) -> None:
    """UserError when the owner cannot pay for the offer."""
    missing = locked.total + fee - balance
    if missing > 0:
        raise UserError(
            f"the job locks {units(locked.total + fee)}, but {address} has {units(balance)}",
            why=f"{units(missing)} are missing",
            next="lower slot_price_max, standby_price, audit_price or audit_rate in [money], "
            "or send money to that address",
            exit_code=Exit.REFUSED,
        )
