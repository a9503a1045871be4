"""Runs on a GPU: a small job cut and replayed there; prints what the tests want to know as JSON.

python -m tests.train.gpu_job FAMILY WIRE LANES DIRECTORY, in a worker's environment for a GPU.
"""

import functools
import json
import sys
from pathlib import Path

from tdmld.train.numerics import check_environment, check_torch, worker_device
from tdmld.train.slot import Slot
from tests.train.support import SHORT, family_spec, replayed, run_job, text_of, tokens_of


def main() -> None:
    family, wire, lanes, place = sys.argv[1:]
    check_environment()
    check_torch()
    plain = Slot.create
    # The tests' pipelines make their slots themselves, on the CPU unless they are told otherwise.
    Slot.create = functools.partial(plain, device=worker_device())  # type: ignore[method-assign]
    more = {"pipeline__lanes": {"count": int(lanes), "mode": "sync"}}
    spec = family_spec(family, 3, **SHORT, train__wire=wire, **more)
    data = tokens_of(spec, text_of(family))
    first = run_job(spec, data, Path(place) / "first")
    second = run_job(spec, data, Path(place) / "second")
    again = {
        (lane, stage): [
            replayed(spec, data, Path(place) / "first", stage, number, lane)
            for number in range(spec.rounds)
        ]
        for lane, stage in first
    }
    Slot.create = plain  # type: ignore[method-assign]
    host = run_job(spec, data, Path(place) / "host")
    told = [
        [list(record.losses or ()) for own in found.values() for record in own]
        for found in (first, host)
    ]
    document = {
        "device": worker_device(),
        "same": first == second,
        "replayed": first == again,
        "start": [r[0].start_shared == host[s][0].start_shared for s, r in first.items()],
        "losses": told,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
