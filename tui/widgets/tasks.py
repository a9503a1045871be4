"""Slots, standbys and audits that this node works on."""

from rich.text import Text

from tdmld.rpc.types import NodeStatus
from tui.text import state_style, units
from tui.widgets.rows import Rows


class TasksTable(Rows):
    """One row a task."""

    TITLE = "Slots I run"
    HEAD = (
        "job",
        "role",
        "slot",
        "layers",
        "segment",
        "step",
        "tok/s",
        "settled",
        "earned",
        "state",
    )
    RIGHT = frozenset({"segment", "step", "tok/s", "settled", "earned"})

    def show(self, status: NodeStatus) -> None:
        """Replace the rows."""
        self.replace(
            {
                f"{task.job}.{task.role}.{task.lane}.{task.stage}.{number}": (
                    task.job[:8],
                    task.role,
                    f"{task.lane}.{task.stage}",
                    f"{task.layers[0]}-{task.layers[1] - 1}",
                    f"{task.segment:,}/{task.segments:,}",
                    f"{task.step:,}/{task.steps:,}",
                    f"{task.tokens_per_second:,.0f}" if task.tokens_per_second else "—",
                    f"{task.settled:,}",
                    units(task.earned),
                    Text(task.state, style=state_style(task.state)),
                )
                for number, task in enumerate(status.tasks)
            }
        )
