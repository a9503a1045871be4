"""What the screens live on, and where it comes from.

    node ── JSON-RPC ──> RpcFeed ──> worker of the app ──> Snapshot ──> screens ──> widgets
                         FakeFeed of the tests ──┘

A feed knows nothing of Textual, and widgets know nothing of feeds.
"""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from tdmld.rpc.types import Earnings, JobDetail, JobEvent, JobSummary, NodeStatus

Selected = Callable[[], str | None]
"""The id of the job that the user looks at, asked anew for each snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """Everything on all screens at one moment."""

    status: NodeStatus
    earnings: Earnings
    jobs: tuple[JobSummary, ...]
    job: JobDetail | None = None
    """The selected one."""


@dataclass(frozen=True)
class Link:
    """Whether the picture is live. `retry_in` counts seconds; 0 means trying now."""

    live: bool
    problem: str = ""
    retry_in: float = 0.0


class Feed(Protocol):
    """Where snapshots and events come from.

    Both end only by RpcError (nobody answers, wrong token, the node refuses) or by being closed;
    the app then waits and calls them again.
    """

    def snapshots(self, selected: Selected) -> AsyncGenerator[Snapshot]:
        """The present state at once, then again whenever it may have changed."""

    def events(self, job: str) -> AsyncGenerator[JobEvent]:
        """What happens in a job from now on; ends when the job has ended."""
