"""The record of a finished job that anybody can check: `provenance.json` beside the model.

It says which program ran (the spec), who ran which slot, every state root that was committed, every
audit with its verdict, every payment, and the result; and it is signed by the node that wrote it.
The roots are those of the chain: `tdmld reference` makes the same ones from the spec and the text.
"""

import json

from tdmld.chain.crypto import KeyPair, address, public_key, verify
from tdmld.chain.errors import DecodeError
from tdmld.chain.records import Job
from tdmld.chain.state import State
from tdmld.node.duties import assigned

FORMAT = "tdmld provenance 1"
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
        "standby": address(job.standby.node) if job.standby is not None else None,
        "slots": [
            {
                "lane": job.lane_of(index),
                "stage": job.stage_of(index),
                "worker": address(slot.worker.node),
                "owner": address(slot.worker.owner),
                "genesis": None
                if slot.genesis is None
                else {"shared": slot.genesis.shared.hex(), "lane": slot.genesis.lane.hex()},
                "segments": [
                    _segment(state, job, index, number) for number in range(slot.committed)
                ],
            }
            for index, slot in enumerate(slots)
        ],
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


def _segment(state: State, job: Job, index: int, number: int) -> dict[str, object]:
    segment = state.segment(job.id, index, number)
    assert segment is not None, "every committed segment has a record"
    audit = state.audit(job.id, index, number)
    return {
        "segment": number,
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
