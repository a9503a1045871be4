"""The second ledger's genesis (section 4)."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.chain.second.formats import (
    LIMIT,
    ZERO,
    H,
    canonical,
    check,
    header_of,
    key_of,
    pack,
    u64,
    unpack,
)
from tests.chain.second.trees import state_root


@dataclass(frozen=True)
class Genesis:
    chain: bytes
    document: dict[str, Any]
    sets: dict[int, bytes]
    """Epoch -> its encoded `ValidatorSet`: of genesis, and of the state that follows (EPOCH-1)."""

    @property
    def epoch_blocks(self) -> int:
        return int(self.document["parameters"]["epoch_blocks"])

    def seats(self, epoch: int) -> list[tuple[bytes, bytes, int, bool]]:
        """(node, owner, weight, leads) in the committee's order (BLK-9)."""
        number, seats = unpack(self.sets[epoch])
        check(number == epoch, "a validator set of another epoch")
        return [tuple(seat) for seat in seats]

    def protocol(self, height: int) -> int:
        return max((at, version) for at, version in self.document["protocol"] if at <= height)[1]


def first_state(document: dict[str, Any]) -> tuple[dict[bytes, bytes], dict[int, bytes]]:
    """GEN-6, with GEN-3 and GEN-4: the state, and the sets of epochs 0 and 1."""
    balances = {key_of(owner): amount for owner, amount in document["accounts"]}
    votes = {key_of(owner): stake for owner, _, stake in document["validators"]}
    works = {key_of(owner): stake for owner, stake in document["work_stakes"]}
    nodes = {key_of(node): key_of(owner) for owner, node, _ in document["validators"]}
    nodes |= {key_of(node): key_of(owner) for owner, node in document["nodes"]}
    check(not set(nodes) & {*balances, *votes, *works, *nodes.values()}, "GEN-3")
    supply = sum(balances.values()) + sum(votes.values()) + sum(works.values())
    check(0 < supply < LIMIT, "GEN-4")
    state = {
        b"a" + key: pack([balances.get(key, 0), 0, votes.get(key, 0), works.get(key, 0)])
        for key in {*balances, *votes, *works}
    }
    state |= {b"n" + node: pack([owner, 0, 0, 0, 0, 0, 0, 0]) for node, owner in nodes.items()}
    stakes = supply - sum(balances.values())
    state[b"S"] = pack([supply, supply - stakes, stakes, 0, 0, 0])
    moment = datetime.fromisoformat(document["time"])
    rows = document["validators"]
    seats = sorted([key_of(node), key_of(owner), stake, True] for owner, node, stake in rows)
    sets = {epoch: pack([epoch, seats]) for epoch in (0, 1)}
    state |= {b"v" + u64(epoch): raw for epoch, raw in sets.items()}
    state |= {b"w" + owner: pack([node]) for node, owner, _, _ in seats}
    for first in {owner[:1] for _, owner, _, _ in seats}:
        bucket = sorted(owner for _, owner, _, _ in seats if owner[:1] == first)
        state[b"iw" + first] = pack([bucket])
    state[b"e" + u64(0)] = pack([0, round(moment.timestamp() * 1000)])
    return state, sets


def read_genesis(line: dict[str, Any], known: str | None) -> tuple[Genesis, bytes]:
    """Point 1: the founded chain, and the id of header 0."""
    document = line["document"]
    chain = H(canonical(document))
    check(line["format"] == "tdmld-export-1", "another format")
    check(line["chain_id"] == chain.hex(), "genesis: the document has another chain id")
    check(known in (None, chain.hex()), f"this is the chain {chain.hex()}, not {known}")
    state, sets = first_state(document)
    root = state_root(state)
    check(line["state_root"] == root.hex(), "genesis: GEN-6 gives another state root")
    moment = datetime.fromisoformat(document["time"])
    time_ms = round(moment.timestamp() * 1000)
    version = max(row for row in document["protocol"] if row[0] == 0)[1]
    header = [version, 0, 0, 0, chain, time_ms, ZERO, b"", ZERO, 0, ZERO, root, ZERO, ZERO]
    check(header_of(line["header"]) == header, "genesis: GEN-7 gives another header")
    check(line["hash"] == H(pack(header)).hex(), "genesis: the header has another id")
    return Genesis(chain, document, sets), H(pack(header))
