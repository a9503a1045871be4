"""Records of owners: their money, their stake, their seats, and what they have done (`records`)."""

from tdmld.chain.codec import Amount, Natural, PublicKey, Record


class Account(Record, frozen=True):
    """An owner's money: free balance, next nonce, and the two stake buckets (only vote votes)."""

    balance: Amount = 0
    nonce: Natural = 0
    vote_stake: Amount = 0
    work_stake: Amount = 0


class Supply(Record, frozen=True):
    """Where all money is. The sum of the last five is `genesis`, after every block."""

    genesis: Amount
    balances: Amount
    stakes: Amount
    unbonding: Amount
    escrows: Amount
    burned: Amount


class Unbonding(Record, frozen=True):
    """Stake on its way back to the balance: both windows count from the begin of `epoch`, the first
    in which it votes no more."""

    bucket: str
    amount: Amount
    epoch: Natural


class Unbondings(Record, frozen=True):
    """All of an owner's, by bucket and epoch; at most limits.UNBONDINGS."""

    entries: tuple[Unbonding, ...] = ()

    @property
    def total(self) -> int:
        return sum(entry.amount for entry in self.entries)


class Nominee(Record, frozen=True):
    """The node that votes for an owner, while it is in force and the owner has vote stake."""

    node: PublicKey


class Seat(Record, frozen=True):
    """A validator of one epoch. `weight` follows the owner's vote stake, at a bounded pace; it
    votes with it also while it has no turns to lead (`jail`)."""

    node: PublicKey
    owner: PublicKey
    weight: Amount
    leads: bool = True


class ValidatorSet(Record, frozen=True):
    """The validators of one epoch by ascending node key; the id in headers is its hash."""

    epoch: Natural
    seats: tuple[Seat, ...]


class EpochStart(Record, frozen=True):
    """When an epoch began: the last height before it, and that block's time."""

    height: Natural
    time_ms: Natural


class Absences(Record, frozen=True):
    """Turns to lead that were missed in one epoch so far, for each seat of its set."""

    missed: tuple[Natural, ...]


class Offence(Record, frozen=True):
    """A node's double voting in one epoch that was proven, at `height`; `burned` in units."""

    node: PublicKey
    height: Natural
    burned: Amount


class Facts(Record, frozen=True):
    """What an owner's nodes have done, the only input of `reputation`; `earned` in units."""

    segments: Natural = 0
    audits: Natural = 0
    proofs: Natural = 0
    faults: Natural = 0
    mismatches: Natural = 0
    earned: Amount = 0
