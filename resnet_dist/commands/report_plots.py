"""The pictures of `resnet-dist report`. matplotlib is imported when a picture is drawn."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.logs.history import Curve, RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RUN_COLORS = ("#1f5fa8", "#c8501e", "#3a8a4d", "#8a5fb0", "#8a8a8a", "#b08a1f")

SPLITS = {
    "train": ("train", "#8a8a8a"),
    "val": ("val", "#1f5fa8"),
    "val_ema": ("val, EMA", "#c8501e"),
}
"""prefix of the keys in metrics.jsonl -> name and color"""

_PANELS_OF_A_RUN = {
    "loss": "loss (cross-entropy, nats)",
    "top1": "top-1 (%)",
    "lr": "learning rate",
    "images_per_second": "images per second, all ranks",
}

_PANELS_OF_SEVERAL_RUNS = {
    "train/loss": "training loss (nats)",
    "val/top1": "validation top-1 (%)",
}

# More points than this need no markers.
_MOST_MARKERS = 40


def plot_run(run: RunHistory, out: Path) -> None:
    """Draw loss, top-1, learning rate and speed against the epoch.

    Args:
        run: The run.
        out: The file of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: `out` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = _PANELS_OF_A_RUN.items()
    for axis, (metric, label) in zip(axes.flat, panels, strict=True):
        for prefix, (name, color) in SPLITS.items():
            curve = run.curve(f"{prefix}/{metric}")
            _draw(axis, curve, name, color)
        axis.set_ylabel(label)
    lower_row = axes[1]
    for axis in lower_row:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    figure.suptitle(run.name, fontsize=12)
    _save(figure, out)


def plot_runs(runs: Sequence[RunHistory], out: Path) -> None:
    """Draw training loss and validation top-1 of each run.

    Args:
        runs: The runs.
        out: The file of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: `out` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = _PANELS_OF_SEVERAL_RUNS.items()
    for axis, (key, label) in zip(axes, panels, strict=True):
        for run, color in zip(runs, cycle(_RUN_COLORS), strict=False):
            curve = run.curve(key)
            _draw(axis, curve, run.name, color)
        axis.set_ylabel(label)
        axis.set_xlabel("epoch")
    _save(figure, out)


def _draw(axis: "Axes", curve: Curve, name: str, color: str) -> None:
    """Draw a curve, unless it is empty. Its last value is in the legend."""
    if not curve.values:
        return
    marker = None
    if len(curve.values) <= _MOST_MARKERS:
        marker = "o"
    last = curve.values[-1]
    axis.plot(
        curve.epochs,
        curve.values,
        color=color,
        linewidth=1.5,
        marker=marker,
        markersize=3,
        label=f"{name}: {last:.4g} at the end",
    )


def _save(figure: "Figure", out: Path) -> None:
    """Give all panels their grid and their legend, and write the picture."""
    for axis in figure.axes:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        outer_lines = axis.spines[["top", "right"]]
        outer_lines.set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=120)
