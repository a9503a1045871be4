"""The loss curve. The only place that knows plotext."""

from textual_plotext import PlotextPlot

from tdmld.rpc.types import JobDetail


class LossChart(PlotextPlot):
    """Mean training loss of each committed segment, one line a lane."""

    def on_mount(self) -> None:
        """Put the title into the frame."""
        self.border_title = "Loss (nats a token)"

    def show(self, job: JobDetail) -> None:
        """Draw anew."""
        plot = self.plt
        plot.clear_data()
        plot.clear_figure()
        lanes: dict[int, list[tuple[int, float]]] = {}
        for point in job.losses:
            step = (point.segment + 1) * job.segment_steps
            lanes.setdefault(point.lane, []).append((step, point.loss / 1e6))
        for lane, points in sorted(lanes.items()):
            label = f"lane {lane}" if len(lanes) > 1 else None
            plot.plot(
                [step for step, _ in points],
                [loss for _, loss in points],
                marker="braille",
                label=label,
            )
        plot.xlim(0, job.summary.steps)
        plot.xlabel("step" if lanes else "no segment is committed yet")
        newest = job.summary.loss
        self.border_subtitle = f"now {newest / 1e6:.3f}" if newest is not None else ""
        self.refresh()
