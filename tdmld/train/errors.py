"""Everything `tdmld.train` raises.

TrainError
├── SpecError        a job file or spec breaks a rule; names the field, the problem, the remedy
├── FileError        a snapshot, frame log, digest list or data file is not what it claims
├── NumericsError    the process does not compute under the pinned settings; do not start work
└── SegmentFault     a segment cannot go on: an input that the program refuses
"""


class TrainError(Exception):
    """Root of the package's errors."""


class SpecError(TrainError):
    """A job file or a spec breaks a rule. Show it to whoever wrote the job."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class FileError(TrainError):
    """A file of a slot is corrupt, foreign or too large. Catch where it was fetched or read."""


class NumericsError(TrainError):
    """Threads, versions or environment differ from the pinned ones; its bits would be worthless."""


class SegmentFault(TrainError):
    """The program refuses to go on: `reason` is size, nonfinite, label or token.

    It is part of the program: a replay of the same inputs raises the same fault at the same place.
    """

    def __init__(self, reason: str, step: int, detail: str) -> None:
        super().__init__(f"step {step}: {detail} [{reason}]")
        self.reason = reason
        self.step = step
