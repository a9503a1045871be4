"""Errors of the chain side of a node.

ChainSideError
├── StoreError             the database cannot be used; tell the operator and stop
│   ├── StoreLocked        another process has it open
│   ├── StoreCorrupt       its content is damaged or is not what this program wrote
│   └── StoreMismatch      it belongs to another chain, key or program version
├── CheckpointMismatch     the network's chain is not the one that the operator trusts; stop
├── SnapshotUnavailable    no connected peer could give a snapshot that holds
├── SignGuardError         a vote would contradict a stored one; stop voting at once
├── ProtocolUnknown        the chain has moved to rules that this program does not know
├── NotProvable            this node cannot prove that now, or ever; says why
├── SpecUnavailable        no connected peer has the spec; try again later
└── ServiceBusy            a bounded queue is full; try again later
"""


class ChainSideError(Exception):
    """Root; `str(error)` names the cause and the remedy."""


class StoreError(ChainSideError):
    """The chain database cannot be opened, read or written."""


class StoreLocked(StoreError):
    """Another process, or this one, already has the database open."""


class StoreCorrupt(StoreError):
    """The database is damaged."""


class StoreMismatch(StoreError):
    """The database was made for something else."""


class CheckpointMismatch(ChainSideError):
    """A quorum finalized another block than the configured checkpoint."""


class SnapshotUnavailable(ChainSideError):
    """Nobody connected could give a snapshot that holds; block sync still works."""


class SignGuardError(ChainSideError):
    """Two contradicting signatures were asked for: a bug, or a directory that somebody edited."""


class ProtocolUnknown(ChainSideError):
    """A finalized block has a protocol version that this program does not implement."""


class NotProvable(ChainSideError):
    """A proof was asked for that this node cannot make."""


class SpecUnavailable(ChainSideError):
    """Nobody connected could give the spec."""


class ServiceBusy(ChainSideError):
    """A limit of the service is reached."""
