"""The record of a finished job that anybody can check: `provenance.json` beside the model.

It says which program ran (the spec), who ran which slot and who had it before, every state root
that was committed, by whom and in which epoch, every audit with its verdict, every payment, and
the result; and it is signed by the node that wrote it.
The roots are those of the chain: `tdmld reference` makes the same ones from the spec and the text.
"""

import json
from collections.abc import Iterator

from tdmld.chain.crypto import KeyPair, address, public_key, verify
from tdmld.chain.errors import DecodeError
from tdmld.chain.records import Former, Job
from tdmld.chain.state import State
from tdmld.chain.transactions import LaneMode
from tdmld.node.duties import assigned

FORMAT = "tdmld provenance 2"
DOMAIN = "provenance"
MAX_BYTES = 64 << 20


def document(
    state: State, job: Job, chain: str, chain_id: bytes, height: int, spec: bytes
) -> dict[str, object]:
    """What the chain knows of `job` at `height`, as JSON."""
    slots = assigned(state, job)
    return {
        "format": FORMAT,
        "chain": chain,
        "chain_id": chain_id.hex(),
        "height": height,
        "job": job.id.hex(),
        "status": job.status.value,
        "submitter": address(job.submitter),
        "spec_id": job.spec_id.hex(),
        "spec": spec.decode("ascii"),
        "class": job.class_id,
        "epoch": job.epoch,
        "ring": job.ring,
        "lanes": {
            "mode": job.lane_mode.value,
            "weights": list(job.lane_weights),
            "lost": list(job.lost_lanes),
        },
        "standby": address(job.standby.node) if job.standby is not None else None,
        "slots": [
            {
                "lane": job.lane_of(index),
                "stage": job.stage_of(index),
                "worker": address(slot.worker.node),
                "owner": address(slot.worker.owner),
                "incarnation": slot.incarnation,
                "former": [_former(former) for former in slot.former],
                "genesis": None
                if slot.genesis is None
                else {"shared": slot.genesis.shared.hex(), "lane": slot.genesis.lane.hex()},
                "segments": [
                    _segment(state, job, index, number) for number in range(slot.committed)
                ],
            }
            for index, slot in enumerate(slots)
        ],
        "rounds": list(_rounds(state, job)),
        "payments": {
            address(owner): {
                "worker": paid.worker,
                "standby": paid.standby,
                "auditor": paid.auditor,
            }
            for owner, paid in state.payments(job.id).items()
        },
        "result": job.result.hex(),
        "holders": [address(node) for node, _ in job.results],
    }


def _former(former: Former) -> dict[str, object]:
    return {
        "worker": address(former.node),
        "owner": address(former.owner),
        "cause": former.cause.value,
        "epoch": former.epoch,
        "incarnation": former.incarnation,
        "settled": former.settled,
        "height": former.height,
    }


def _rounds(state: State, job: Job) -> Iterator[dict[str, object]]:
    """Whose contributions went into the next segment, round by round."""
    for number in range(job.rounds if job.lane_mode is LaneMode.DILOCO else 0):
        found = state.round(job.id, number)
        if found is not None and found.decided:
            yield {
                "round": number,
                "decided": found.decided,
                "included": list(found.included),
                "contributions": [content.hex() for content in found.contributions],
            }


def _segment(state: State, job: Job, index: int, number: int) -> dict[str, object]:
    segment = state.segment(job.id, index, number)
    assert segment is not None, "every committed segment has a record"
    audit = state.audit(job.id, index, number)
    return {
        "segment": number,
        "worker": address(segment.worker),
        "epoch": segment.epoch,
        "incarnation": segment.incarnation,
        "contribution": segment.contribution.hex(),
        "end_shared": segment.end_shared.hex(),
        "end_lane": segment.end_lane.hex(),
        "links": {
            roots.link: {"sent": roots.sent.hex(), "received": roots.received.hex()}
            for roots in segment.links
        },
        "seal": segment.seal.hex(),
        "loss": segment.loss,
        "status": segment.status.value,
        "proof": segment.proof.value,
        "committed": segment.committed,
        "settled": segment.settled,
        "audit": None
        if audit is None
        else {
            "auditor": address(audit.auditor) if audit.auditor else "",
            "verdict": audit.status.value,
            "list_root": audit.auditor_list.hex(),
        },
    }


def sign(key: KeyPair, chain_id: bytes, content: dict[str, object]) -> bytes:
    """The signed file's bytes."""
    signature = key.sign(DOMAIN, chain_id, _canonical(content))
    signed = {"provenance": content, "signer": key.address, "signature": signature.hex()}
    return (json.dumps(signed, sort_keys=True, indent=1) + "\n").encode()


def check(raw: bytes) -> dict[str, object]:
    """The content of a signed file; DecodeError when it is malformed or its signature wrong."""
    if len(raw) > MAX_BYTES:
        raise DecodeError(f"a provenance file of {len(raw)} bytes; at most {MAX_BYTES}")
    try:
        signed = json.loads(raw)
        content = signed["provenance"]
        chain_id = bytes.fromhex(content["chain_id"])
        signer, signature = public_key(signed["signer"]), bytes.fromhex(signed["signature"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DecodeError(f"not a provenance file: {error}") from error
    if content.get("format") != FORMAT:
        raise DecodeError(f"provenance of an unknown format {content.get('format')!r}")
    if not verify(signer, DOMAIN, chain_id, _canonical(content), signature):
        raise DecodeError("the provenance file was changed after it was signed")
    return dict(content)


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
