"""Everything `tdmld.chain` raises.

ChainError
├── DecodeError          bytes from outside are not what they claim: size, type, form
├── GenesisError         the genesis document cannot found a chain; names the field
├── InvalidTransaction   expected in normal operation: refused, or a recorded failure
├── InvalidBlock         expected from a faulty leader: do not notarize, do not apply
├── ProofRefused         a proof from a stranger does not hold; names what is wrong with it
└── InvariantViolation   never expected: our own bug or a corrupt database; stop the node
"""


class ChainError(Exception):
    """Root of the package's errors."""


class DecodeError(ChainError):
    """Bytes from a peer, a disk or a user are not what they claim. Catch where they entered."""


class GenesisError(ChainError):
    """A genesis document is malformed or contradicts itself. Shown to the operator at start."""


class InvalidTransaction(ChainError):
    """A transaction breaks a rule; `str(error)` names the rule and the remedy for its sender."""


class InvalidBlock(ChainError):
    """A proposed or received block breaks a rule of form. Catch where blocks enter."""


class ProofRefused(ChainError):
    """A proof bundle or a snapshot does not hold. Nothing in it may be believed."""


class InvariantViolation(ChainError):
    """Something that the rules make impossible has happened. Nothing may go on after it."""
