"""Transactions about members that cannot go on, or do not do their part (`transactions`)."""

from enum import StrEnum
from typing import Annotated

import msgspec

from tdmld.chain import limits
from tdmld.chain.codec import Hash, Natural, Record


class LeaveReason(StrEnum):
    """What a worker says when it gives its slot up."""

    DEVICE = "device"  # the device is lost
    DISK = "disk"  # the disk is full
    MEMORY = "memory"  # out of memory
    STOPPED = "stopped"  # it cannot go on: the worker ends again and again, or its owner stops it


class Leave(Record, frozen=True, tag="leave"):
    """The worker gives its slot up."""

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    reason: LeaveReason


class Stall(Record, frozen=True, tag="stall"):
    """The worker of `slot` waits in vain for frame `seq` on its link `link`. `number`: the slot's
    SlotState.stalls, so that nobody can say it again for it."""

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    number: Natural
    link: Annotated[str, msgspec.Meta(max_length=limits.LINK_NAME)]
    seq: Natural


class Present(Record, frozen=True, tag="present"):
    """The worker of an accused slot is there, and serves its frames. `opened`: Case.opened of the
    case against it (SlotState.case)."""

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    opened: Natural


class Witness(Record, frozen=True, tag="witness"):
    """The standby tried to fetch the frame of the case against `slot` from its worker.
    `incarnation`: of the accused slot; `opened`: Case.opened, so that it speaks of this case."""

    job: Hash
    epoch: Natural
    slot: Natural
    incarnation: Natural
    opened: Natural
    delivered: bool
