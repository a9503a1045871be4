"""`tdmld light`: proofs for people who run no node, and their check."""

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import App, Parameter

from tdmld import files
from tdmld.chain.accounts import (
    Account,
)
from tdmld.chain.blocks import block_hash
from tdmld.chain.checkpoint import Checkpoint, parse_checkpoint
from tdmld.chain.codec import Record
from tdmld.chain.crypto import address, sha256
from tdmld.chain.errors import ChainError, DecodeError, ProofRefused
from tdmld.chain.genesis import GENESIS_BYTES_MAX, Genesis, load_genesis
from tdmld.chain.light import (
    BUNDLE_BYTES,
    BlockClaim,
    Proven,
    StateClaim,
    TransactionClaim,
    check_bundle,
    read_bundle,
    record_of,
    state_key,
)
from tdmld.chain.records import (
    Audit,
    Earnings,
    Job,
    Segment,
)
from tdmld.chain.turns import trust_ends_ms
from tdmld.cli.common import AsJson, DataDir, emit, resolve_data_dir
from tdmld.cli.exits import Exit
from tdmld.cli.node import connect
from tdmld.errors import UserError
from tdmld.rpc.types import Proof, time_text

app = App(name="light", help_format="plaintext")

Trust = Annotated[
    str,
    Parameter(
        name="--checkpoint", help="HEIGHT:HASH of a block that you trust (default: genesis alone)."
    ),
]


@app.command
async def fetch(
    kind: str, key: str, /, *, out: Path, checkpoint: Trust = "", data_dir: DataDir = None
) -> None:
    """Ask a node for a proof and write it to a file. The node need not be trusted.

    KIND KEY is one of: account ADDRESS, node ADDRESS, facts ADDRESS, job ID, payment JOB/ADDRESS,
    slot JOB/SLOT, segment JOB/SLOT/SEGMENT, audit JOB/SLOT/SEGMENT, transaction ID, block HEIGHT.

    Parameters
    ----------
    kind: What is to be proven.
    key: Of which one.
    out: The file to write.
    """
    trusted = _checkpoint(checkpoint)
    height = 0 if trusted is None else trusted.height
    async with connect(data_dir) as client:
        params = {"kind": kind, "key": key, "checkpoint": height}
        proof = await client.call("chain_prove", params, Proof, patience=60.0)
    raw = bytes.fromhex(proof.raw)
    await trio.to_thread.run_sync(files.write_file, out, raw)
    emit("", f"{out}: {len(raw)} bytes, under block {proof.height}", as_json=False)


@app.command
def verify(
    file: Path,
    expect: str = "",
    /,
    *,
    genesis: Path | None = None,
    checkpoint: Trust = "",
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Check a proof, without a node and without the chain; say what it proves.

    Needs the network's genesis document, and nothing from whoever made the proof. The proof leads
    from the validators of genesis, or of the block that you trust, to those that signed the newest
    block in it. Warns when what you trust is so old that those validators may have left with their
    stake: then take a newer block from somebody whom you trust, and fetch the proof from that one.

    Parameters
    ----------
    file: The proof.
    expect: What it must be of, such as account/ADDRESS or audit/JOB/0/3; else it is refused.
    genesis: The genesis document (default: that of the node's directory).
    """
    network = _genesis(genesis or resolve_data_dir(data_dir) / "genesis.json")
    trusted = _checkpoint(checkpoint)
    try:
        bundle = read_bundle(files.read_file(file, BUNDLE_BYTES))
        proven = check_bundle(bundle, network, trusted)
        _check_expected(proven, expect)
        document = describe(proven) | _trust(proven, network)
    except files.FileTooLarge as error:
        raise UserError(f"{file} is no proof", why=str(error), exit_code=Exit.REFUSED) from error
    except ProofRefused as error:
        raise UserError(
            f"{file} proves nothing",
            why=str(error),
            next="fetch it again, from another node",
            exit_code=Exit.REFUSED,
        ) from error
    emit(document, _lines(document), as_json=json)


def describe(proven: Proven) -> dict[str, Any]:
    """What a checked proof says, for people and scripts."""
    found: dict[str, Any] = {
        "final_height": proven.final.height,
        "final_hash": proven.final_hash.hex(),
        "final_time": time_text(proven.final.time_ms),
        "height": proven.height,
    }
    match proven.claim:
        case StateClaim() as claim:
            record = record_of(claim)
            found |= _key_fields(claim.key)
            found["present"] = record is not None
            found["record"] = None if record is None else _plain(record)
            found["says"] = _sentence(found, record)
        case TransactionClaim(header, raw, ok):
            transaction = proven.transaction
            assert transaction is not None
            found |= {
                "kind": "transaction",
                "id": sha256(raw).hex(),
                "ok": ok,
                "block": block_hash(header).hex(),
                "time": time_text(header.time_ms),
                "signer": address(transaction.signer),
                "record": {type(transaction.payload).__name__: _plain(transaction.payload)},
            }
            found["says"] = (
                f"the {type(transaction.payload).__name__} of {found['signer']} "
                f"{'succeeded' if ok else 'failed'} in block {proven.height}, {found['time']}"
            )
        case BlockClaim(header):
            key = block_hash(header).hex()
            found |= {"kind": "block", "hash": key, "record": _plain(header)}
            found["says"] = f"block {header.height} of {time_text(header.time_ms)} is {key}"
    return found


def now_ms() -> int:
    """The verifier's clock."""
    return time.time_ns() // 1_000_000


def _trust(proven: Proven, network: Genesis) -> dict[str, Any]:
    """What the proof rests on, and whether that is older than the unbonding period."""
    header = proven.trusted
    since = network.time_ms if header is None else header.time_ms
    return {
        "trusted_height": 0 if header is None else header.height,
        "trusted_time": time_text(since),
        "trust_expired": now_ms() > trust_ends_ms(network, since),
        "unbonding_seconds": network.parameters.unbonding[1],
    }


def _key_fields(key: bytes) -> dict[str, Any]:
    letter, rest = key[:1], key[1:]
    match letter:
        case b"a" | b"f" | b"n":
            kind = {b"a": "account", b"f": "facts", b"n": "node"}[letter]
            return {"kind": kind, "address": address(rest)}
        case b"p":
            return {"kind": "payment", "job": rest[:32].hex(), "address": address(rest[32:])}
        case b"j":
            return {"kind": "job", "job": rest.hex()}
        case _:
            kind = {b"s": "slot", b"g": "segment", b"u": "audit"}[letter]
            fields = {"kind": kind, "job": rest[:32].hex(), "slot": int.from_bytes(rest[32:36])}
            return fields if kind == "slot" else fields | {"segment": int.from_bytes(rest[36:])}


def _sentence(found: dict[str, Any], record: Record | None) -> str:
    where = f"after block {found['height']}"
    match record:
        case None:
            return f"there is no such {found['kind']} {where}"
        case Account():
            return (
                f"{found['address']} has {record.balance}, and {record.vote_stake} + "
                f"{record.work_stake} staked, {where}"
            )
        case Earnings():
            return (
                f"{found['address']} was paid {record.total} for the job: {record.worker} as "
                f"worker, {record.standby} as standby, {record.auditor} as auditor, {where}"
            )
        case Audit():
            who = address(record.owner) if record.owner else "nobody yet"
            return (
                f"the audit of segment {found['segment']} of slot {found['slot']} by {who} is "
                f"{record.status}, paid {record.paid}, {where}"
            )
        case Segment():
            return (
                f"segment {found['segment']} of slot {found['slot']} by {address(record.worker)} "
                f"is {record.status}, {where}"
            )
        case Job():
            reason = f" ({record.reason})" if record.reason else ""
            return f"the job is {record.status}{reason}, with {record.locked} locked, {where}"
        case _:
            return f"the {found['kind']} is as shown, {where}"


def _plain(record: Record) -> Any:
    return _text(msgspec.structs.asdict(record))


def _text(value: object) -> Any:
    """Bytes as hex, records as objects: what JSON can say."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): _text(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_text(one) for one in value]
    if isinstance(value, Record):
        return _text(msgspec.structs.asdict(value))
    return value if isinstance(value, int | str | float | None) else str(value)


def _lines(document: dict[str, Any]) -> list[str]:
    lines = [f"proven: {document['says']}"]
    record = document["record"] or {}
    lines += [f"  {name}: {value}" for name, value in record.items()]
    lines.append(
        f"vouched for by block {document['final_height']} of {document['final_time']}, "
        f"{document['final_hash']}, signed by more than two thirds of the stake"
    )
    height = document["trusted_height"]
    what = f"block {height}" if height else "genesis"
    lines.append(f"trusting {what} of {document['trusted_time']}")
    if document["trust_expired"]:
        lines.append(
            f"warning: that is longer ago than the unbonding period of "
            f"{document['unbonding_seconds']} s: the validators of then may have withdrawn their "
            "stake, and could sign another chain at no cost. Compare block "
            f"{document['final_height']} with a source that you trust, or name a newer block that "
            "you trust with --checkpoint HEIGHT:HASH"
        )
    return lines


def _check_expected(proven: Proven, expect: str) -> None:
    if not expect:
        return
    kind, _, name = expect.partition("/")
    match proven.claim:
        case StateClaim(key):
            fine = kind not in ("transaction", "block") and key == _state_key(kind, name)
        case TransactionClaim(_, raw):
            fine = kind == "transaction" and name == sha256(raw).hex()
        case BlockClaim(header):
            fine = kind == "block" and name == str(header.height)
    if not fine:
        raise ProofRefused(f"it is a proof of something else than {expect}")


def _state_key(kind: str, name: str) -> bytes:
    try:
        return state_key(kind, name)
    except DecodeError as error:
        raise UserError(str(error), exit_code=Exit.USAGE) from error


def _checkpoint(text: str) -> Checkpoint | None:
    try:
        return parse_checkpoint(text) if text else None
    except DecodeError as error:
        raise UserError(
            f"--checkpoint {text!r} cannot be used",
            why=str(error),
            next="write it as HEIGHT:HASH",
            exit_code=Exit.USAGE,
        ) from error


def _genesis(path: Path) -> Genesis:
    try:
        return load_genesis(files.read_file(path, GENESIS_BYTES_MAX))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing",
            next="name the network's genesis document with --genesis FILE",
            exit_code=Exit.NOT_FOUND,
        ) from error
    except (ChainError, files.FileTooLarge) as error:
        raise UserError(f"{path} is no genesis document", why=str(error)) from error
