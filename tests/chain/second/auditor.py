"""A ledger auditor, written from docs/spec/chain.md alone (its rules are cited). It shares no code
with the node: what it needs besides Python is Ed25519 (PyNaCl).

    python -m tests.chain.second.auditor FILE [CHAIN_ID]

It checks points 1 to 7 of section 17; `executor.replay` is point 8.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chain.second.beacon import first_mix, next_mix
from tests.chain.second.committees import VIEWS, epoch_of, table
from tests.chain.second.formats import (
    FINAL,
    FINALIZE,
    HEADER,
    OWNERS,
    PAYLOADS,
    ROWS,
    TRANSACTION_BYTES,
    ZERO,
    H,
    Refused,
    canonical,
    check,
    header_of,
    pack,
    signed,
    spelt,
    u32,
    u64,
    unpack,
)
from tests.chain.second.genesis import Genesis, read_genesis
from tests.chain.second.trees import History, merkle, state_root


@dataclass(frozen=True)
class Report:
    """What was found. `final`: the last height with a certificate of its own. `vouched`: whether a
    final header names the state that was exported."""

    chain_id: str
    height: int
    final: int
    vouched: bool
    transactions: int
    entries: int
    supply: dict[str, int]


# -- 5: state


def money(state: dict[bytes, bytes]) -> dict[str, int]:
    """STATE-4, STATE-5: summed record by record."""
    recorded = unpack(state[b"S"])
    balances = stakes = unbonding = escrows = 0
    for key, value in state.items():
        if key[:1] == b"a":
            balance, _, vote, work = unpack(value)
            balances, stakes = balances + balance, stakes + vote + work
        elif key[:1] == b"b":
            unbonding += sum(amount for _, amount, _ in unpack(value)[0])
        elif key[:1] == b"j":
            escrows += sum(unpack(value)[23:27])
    counted = [balances, stakes, unbonding, escrows]
    check(recorded[1:5] == counted, "the chain recorded other sums")
    check(sum(counted) + recorded[5] == recorded[0], "money is not conserved")
    places = ("genesis", "balances", "stakes", "unbonding", "escrows", "burned")
    return dict(zip(places, recorded, strict=True))


def check_indexes(state: dict[bytes, bytes]) -> None:
    """STATE-2, STATE-3."""
    for name, wanted in (
        (b"k", {key[1:] for key in state if key[:1] == b"k"}),
        (b"w", {key[1:] for key in state if key[:1] == b"w"}),
        (b"j", {k[1:] for k, v in state.items() if k[:1] == b"j" and unpack(v)[28] not in FINAL}),
    ):
        found = set[bytes]()
        for key, value in state.items():
            if key[:2] == b"i" + name:
                (bucket,) = unpack(value)
                check(bucket == sorted(set(bucket)) != [], f"index {key.hex()}")
                check(all(entry[:1] == key[2:] for entry in bucket), f"index {key.hex()}")
                found |= set(bucket)
        check(found == wanted, f"the index {name.decode()} is not what it indexes")


# -- 6: certificates


def check_certificate(
    genesis: Genesis, row: dict[str, Any], header: list[Any], block: bytes
) -> None:
    """BLK-10 to BLK-12."""
    where = f"certificate of block {header[1]}"
    check(sorted(row) == ["hash", "kind", "signatures", "view"], where)
    check((row["kind"], row["hash"]) == (FINALIZE, block.hex()), where)
    view, last = row["view"], header[1] % genesis.epoch_blocks == 0
    check(view == header[2] or (last and view > header[2]), where)
    check(view // VIEWS == header[2] // VIEWS, where)
    voters = [voter for voter, _ in row["signatures"]]
    check(voters == sorted(set(voters)), f"{where}: voters must ascend")
    members = genesis.seats(header[2] // VIEWS)
    check(all(0 <= voter < len(members) for voter in voters), where)
    total = sum(weight for _, _, weight, _ in members)
    check(sum(members[v][2] for v in voters) >= total * 2 // 3 + 1, f"{where}: no quorum")
    message = bytes((FINALIZE,)) + u64(view) + block
    for voter, signature in row["signatures"]:
        good = signed(members[voter][0], "vote", genesis.chain, message, bytes.fromhex(signature))
        check(good, f"{where}: signature of voter {voter}")


# -- 9: transactions


def check_transaction(genesis: Genesis, row: dict[str, Any]) -> bytes:
    """Point 3; the id."""
    raw = bytes.fromhex(row["raw"])
    check(row["id"] == H(raw).hex(), "a transaction has another id")
    where = f"transaction {row['id'][:16]}"
    check(64 < len(raw) <= TRANSACTION_BYTES, where)
    body = unpack(raw[64:])
    check(isinstance(body, list) and len(body) == 7 and body[0] == "tx", where)
    _, chain, signer, nonce, fee, expiry, payload = body
    check(chain == genesis.chain, f"{where}: of another chain")
    check(signed(signer, "transaction", chain, raw[64:], raw[:64]), f"{where}: signature")
    names = PAYLOADS[payload[0]].split()
    check(len(names) == len(payload) - 1, f"{where}: fields")
    inner = ["kind", "hash", "signature"] if payload[0] == "vote_evidence" else HEADER
    shown = {
        name: dict(zip(inner, map(spelt, value), strict=True))
        if name in ("first", "second")
        else [dict(zip(ROWS[name], map(spelt, row), strict=True)) for row in value]
        if name in ROWS
        else spelt(value)
        for name, value in zip(names, payload[1:], strict=True)
    }
    wanted = {
        "signer": signer.hex(), "nonce": nonce, "fee": fee, "expiry": expiry,
        "kind": payload[0], "payload": shown,
    }  # fmt: skip
    check(
        all(row[name] == value for name, value in wanted.items()), f"{where}: is shown as another"
    )
    check(row["ok"] is (row["reason"] == ""), f"{where}: its receipt contradicts itself")
    check(payload[0] in OWNERS or not row["ok"] or nonce == fee == 0, f"{where}: FEE-3")
    return H(raw)


# -- 17: the audit


class Auditor:
    """Goes over the lines of one export."""

    def __init__(self, first: dict[str, Any], known: str | None) -> None:
        check(first["line"] == "genesis", "the first line is not genesis")
        self.genesis, self.parent = read_genesis(first, known)
        self.header = header_of(first["header"])
        self.roots = [first["state_root"]]
        self.history = History()
        self.history.append(self.parent + ZERO)
        self.histories = [self.history.root]
        self.mix = first_mix(self.genesis.chain)
        self.final = self.transactions = 0
        self.state: dict[bytes, bytes] = {}
        self.last = b""

    def block(self, row: dict[str, Any]) -> None:
        """Points 2 to 6."""
        header, before, chain = header_of(row["header"]), self.header, self.genesis.chain
        block = H(pack(header))
        height, view, proposer = header[1], header[2], header[6]
        where = f"block {height}"
        check(row["hash"] == block.hex() and row["height"] == height, f"{where}: its id")
        check(height == before[1] + 1 and header[4] == self.parent, f"{where}: its parent")
        check(header[3] == before[2] < view, f"{where}: its view")
        check(header[5] > before[5], f"{where}: its time")
        check(header[0] == self.genesis.protocol(height), f"{where}: its protocol")
        epoch = epoch_of(height, self.genesis.epoch_blocks)
        check(view // VIEWS == epoch, f"{where}: a view of another epoch")
        begins = height > 1 and epoch_of(height - 1, self.genesis.epoch_blocks) != epoch
        check(not begins or self.final == height - 1, f"{where}: its epoch has not begun")
        named = [H(self.genesis.sets[number]) for number in (epoch, epoch + 1)]
        check(header[12:] == named, f"{where}: its validators")
        seats = self.genesis.seats(epoch)
        leaders = table(tuple((weight, leads) for _, _, weight, leads in seats))
        leader = leaders[view % VIEWS % len(leaders)]
        check(seats[leader][0] == proposer, f"{where}: out of turn")
        signature = bytes.fromhex(row["signature"])
        check(signed(proposer, "proposal", chain, block, signature), f"{where}: signature")
        ids = [check_transaction(self.genesis, one) for one in row["transactions"]]
        check(header[8] == merkle(ids), f"{where}: its transactions")
        rules = self.genesis.document["parameters"]
        size = sum(len(one["raw"]) // 2 for one in row["transactions"])
        check(size <= rules["block_bytes"], f"{where}: its size")
        check(len(ids) <= rules["block_transactions"], f"{where}: too many transactions")
        at = header[9]
        check(before[9] <= at < height, f"{where}: its state height")
        check(header[11].hex() == self.roots[at], f"{where}: the state of {at}")
        check(header[10] == self.histories[at], f"{where}: the history up to {at}")
        self.mix = next_mix(chain, self.mix, height, proposer, header[7])
        if row["certificate"] is not None:
            check_certificate(self.genesis, row["certificate"], header, block)
            self.final = height
        outcomes = [
            tx + (b"\1" if one["ok"] else b"\0") + u32(len(ids))
            for tx, one in zip(ids, row["transactions"], strict=True)
        ]
        self.history.append(block + merkle(outcomes))
        self.histories.append(self.history.root)
        self.header, self.parent = header, block
        self.roots.append(row["state_root"])
        self.transactions += len(ids)

    def entry(self, row: dict[str, Any]) -> None:
        key = bytes.fromhex(row["key"])
        check(key > self.last, "the state's keys must ascend")
        self.state[key], self.last = bytes.fromhex(row["value"]), key

    def end(self, row: dict[str, Any]) -> Report:
        """Point 7."""
        height = self.header[1]
        check(state_root(self.state).hex() == row["state_root"] == self.roots[height], "state root")
        check(row["hash"] == self.parent.hex() and row["height"] == height, "end: the last block")
        check(row["mix"] == self.mix.hex(), "end: the beacon")
        counts = (height, self.transactions, len(self.state))
        check((row["blocks"], row["transactions"], row["entries"]) == counts, "end: counts")
        for epoch, named in self.genesis.sets.items():
            check(self.state[b"v" + u64(epoch)] == named, f"end: the validators of epoch {epoch}")
        supply = money(self.state)
        check(row["supply"] == supply, "end: supply")
        check_indexes(self.state)
        return Report(
            chain_id=self.genesis.chain.hex(),
            height=height,
            final=self.final,
            vouched=self.final == height and self.header[11].hex() == row["state_root"],
            transactions=self.transactions,
            entries=len(self.state),
            supply=supply,
        )


def audit(lines: Sequence[bytes], known: str | None = None) -> Report:
    """Check an export; Refused says what is wrong with it."""
    try:
        rows = [json.loads(line) for line in lines]
        for line, row in zip(lines, rows, strict=True):
            check(canonical(row) + b"\n" == line, "a line is not canonical JSON")
        check(rows[-1]["line"] == "end", "the last line is not the end")
        digest = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
        check(rows[-1]["sha256"] == digest, "the bytes are not those that were written")
        auditor = Auditor(rows[0], known)
        for row in rows[1:-1]:
            if row["line"] == "state" and row["key"][:2] == b"v".hex():
                epoch = int.from_bytes(bytes.fromhex(row["key"])[1:], "big")
                auditor.genesis.sets.setdefault(epoch, bytes.fromhex(row["value"]))
        kinds = " ".join(row["line"] for row in rows)
        order = "genesis( block)*( state)+ end"
        check(re.fullmatch(order, kinds) is not None, "lines are missing or out of order")
        for row in rows[1:-1]:
            (auditor.block if row["line"] == "block" else auditor.entry)(row)
        return auditor.end(rows[-1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise Refused(f"malformed: {error!r}") from error


def main() -> int:
    with Path(sys.argv[1]).open("rb") as file:
        lines = file.readlines()
    try:
        report = audit(lines, sys.argv[2] if len(sys.argv) > 2 else None)
    except Refused as error:
        print(f"refused: {error}")
        return 1
    print(report)
    from tests.chain.second.executor import replay

    try:
        replay(lines)
    except Refused as error:
        print(f"the signed blocks do not give this state: {error}")
        return 1
    print("executing the blocks gives the same states and the same receipts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
