"""Everything that the machine side of a node (supervisor, carrier, worker) raises.

MachineError
├── CarrierUnavailable     the carrier process is down or restarting; try again after CarrierUp
├── WorkerFailed           a worker process ended before it had done its task; says how and why
├── ContentError
│   ├── ContentUnavailable no holder could give it; names what and each holder's answer
│   ├── ContentRefused     this machine will not store or serve it: quota, limit, not a member
│   └── ContentMismatch    bytes or roots are not what was promised
├── AuditImpossible        an audit cannot be made: says what was missing (goes into AuditFail)
├── LinkRefused            the peer at the other end of a link broke its protocol
│   └── LinkMismatch       two honest ends of one link would agree on a digest: these do not
└── ControlError           a control message or packet is malformed: our own bug or a broken peer
                           process; the process that sent it is ended
"""

from enum import StrEnum


class FailureCause(StrEnum):
    """Why a worker or its slot stopped, for whoever decides whether to begin it again."""

    DIED = "died"
    """The worker process ended by itself; opening it again may help."""
    KILLED = "killed"
    """A signal ended it, and not for want of memory as far as one can see."""
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"
    REFUSED = "refused"
    """The program refuses what it was given (a state, a frame, the text, a value that is not
    finite): the same again will end the same way."""
    DEVICE = "device"
    """The accelerator is lost or broken."""
    CARRIER = "carrier"
    """The carrier process ended; it is being restarted."""
    LINK = "link"
    """What crossed a link contradicts what is on disk here or there."""


class MachineError(Exception):
    """Root of the machine side's errors; `str(error)` names the cause and the remedy."""


class CarrierUnavailable(MachineError):
    """The carrier process died while a request was under way, or is being restarted."""


class WorkerFailed(MachineError):
    """A worker process ended, or reported a failure, before its task was done."""

    def __init__(self, text: str, cause: FailureCause = FailureCause.DIED) -> None:
        super().__init__(text)
        self.cause = cause


class ContentError(MachineError):
    """Content could not be brought or kept."""


class ContentUnavailable(ContentError):
    """No holder gave the content."""


class ContentRefused(ContentError):
    """Refused: over a limit or quota, disk too full, or the asker is no member of the job."""


class ContentMismatch(ContentError):
    """The bytes do not have the hash or root that was promised."""


class AuditImpossible(MachineError):
    """The inputs of an audited segment could not be had; the text goes into AuditFail."""


class LinkRefused(MachineError):
    """The peer broke a rule of the link protocol. The stream is reset; the slot goes on."""


class LinkMismatch(LinkRefused):
    """A digest differs from what the other end holds. The slot stops before it sends more."""


class ControlError(MachineError):
    """A packet between our own processes is not what it claims to be."""
