"""Audits of a job, newest first."""

from rich.text import Text

from tdmld.rpc.types import JobDetail
from tui.text import short, state_style
from tui.widgets.rows import Rows


class AuditsTable(Rows):
    """One row an audit."""

    TITLE = "Audits"
    HEAD = ("slot", "segment", "auditor", "state", "drawn")
    RIGHT = frozenset({"segment", "drawn"})

    def show(self, job: JobDetail) -> None:
        """Replace the rows."""
        newest = sorted(job.audits, key=lambda audit: -audit.drawn)
        self.replace(
            {
                f"{audit.lane}.{audit.stage}.{audit.segment}.{audit.auditor}": (
                    f"{audit.lane}.{audit.stage}",
                    str(audit.segment),
                    short(audit.auditor),
                    Text(audit.state, style=state_style(audit.state)),
                    f"{audit.drawn:,}",
                )
                for audit in newest
            }
        )
        passed = sum(audit.state == "passed" for audit in job.audits)
        self.border_subtitle = f"{passed} of {len(job.audits)} passed"
