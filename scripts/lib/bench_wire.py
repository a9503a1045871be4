"""What each wire format costs and saves on the frames of a real job.

    scripts/bench wire [--steps 40] [--json F]

The example job (examples/plays-3m.toml) runs for --steps steps as two threads with an fp32 wire;
the frames of its last segment, activations and their gradients, are then sent through every
format. Printed for each: bytes saved (times), the relative error, encoding and decoding in MB of
fp32 a second of one thread (the best of five).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from report import ROOT, Report

from tdmld.train.data import Tokens
from tdmld.train.framelog import frame_log_name, read_frames
from tdmld.train.jobfile import load_job_file
from tdmld.train.numerics import check_torch, pin_process
from tdmld.train.spec import decode_spec
from tdmld.train.wireformat import Wire
from tests.train.support import encode_document, run_pipeline

SEGMENT_STEPS = 5
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="a multiple of 5")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("scripts/bench wire")
    pin_process()
    check_torch()
    for kind, frames in frames_of(arguments.steps).items():
        for wire in get_args(Wire):
            ratio, error, coded, decoded = measure(frames, wire)
            shown = f"{ratio:.2f} x, error {error:.1e}, {coded:,.0f} / {decoded:,.0f} MB/s"
            report.document[f"{kind} {wire}"] = shown
    report.finish(arguments.json)


def frames_of(steps: int) -> dict[str, list[Any]]:
    """Boundary tensors of the last segment, by kind."""
    import msgspec

    from tdmld.train.wire import decode

    job = load_job_file(ROOT / "examples" / "plays-3m.toml")
    document = msgspec.to_builtins(job.spec)
    document["train"] |= {"steps": steps, "wire": "fp32"}
    document["train"]["schedule"] |= {"decay_from": steps}
    document["pipeline"] |= {"segment_steps": SEGMENT_STEPS}
    spec = decode_spec(encode_document(document))
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        run_pipeline(spec, Tokens.from_text(spec, job.text_path), Path(place))
        for kind, stage, link in (("activation", 1, "up"), ("gradient", 0, "down")):
            name = frame_log_name(spec.rounds - 1, link, "received")
            frames = read_frames(Path(place) / str(stage) / "ring" / name, spec.frame_bytes)
            shape = spec.boundary(stage, link)
            found[kind] = [decode(frame.payload, shape, "fp32") for frame in frames]
    return found


def measure(frames: list[Any], wire: str) -> tuple[float, float, float, float]:
    """(bytes saved, relative error, encoding and decoding in MB/s)"""
    import torch

    from tdmld.train.wire import decode, encode

    payloads = [bytes(encode(frame, wire)) for frame in frames]
    again = [decode(p, tuple(f.shape), wire) for p, f in zip(payloads, frames, strict=True)]
    whole, lost = torch.stack(frames), torch.stack(again) - torch.stack(frames)
    size = 4 * whole.numel()
    error = float(torch.linalg.vector_norm(lost) / torch.linalg.vector_norm(whole))

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return size / min(times) / 1e6

    coded = best(lambda: [encode(frame, wire) for frame in frames])
    decoded = best(lambda: [decode(p, tuple(frames[0].shape), wire) for p in payloads])
    return size / sum(map(len, payloads)), error, coded, decoded


if __name__ == "__main__":
    main()
