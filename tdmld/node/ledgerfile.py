"""The ledger of a stopped node, summed without trusting a counter.

`read_ledger` opens the database of a node that does not run, walks over every record of the state,
and adds up accounts, stakes and escrows by itself. What the chain's own counters say stands beside
it: equal sums are the proof that no money came from nowhere.
"""

from dataclasses import dataclass
from pathlib import Path

from tdmld.chain.genesis import GENESIS_BYTES_MAX, load_genesis
from tdmld.chain.ledger import recount
from tdmld.files import read_file
from tdmld.node.store import ChainStore


@dataclass(frozen=True)
class LedgerSums:
    """Money in units. `total` is counted record by record; `burned` and `supply` are the chain's.

    total == supply holds if and only if nothing was made or lost.
    """

    height: int
    accounted: int
    burned: int
    supply: int

    @property
    def total(self) -> int:
        return self.accounted + self.burned


def read_ledger(data_dir: Path) -> LedgerSums:
    """Sum the ledger of a stopped node; StoreLocked while it runs."""
    genesis = load_genesis(read_file(data_dir / "genesis.json", GENESIS_BYTES_MAX))
    with ChainStore(data_dir / "chain", genesis) as store:
        counted = recount(store.state_items())
        return LedgerSums(
            height=store.height,
            accounted=counted.balances + counted.stakes + counted.unbonding + counted.escrows,
            burned=counted.burned,
            supply=counted.genesis,
        )
