"""The pictures of `resnet-dist report`. matplotlib is imported when a picture is drawn."""

from collections.abc import Sequence
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

    Raises ImportError without matplotlib, OSError or ValueError if `out` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (metric, label) in zip(axes.flat, _PANELS_OF_A_RUN.items(), strict=True):
        for prefix, (name, color) in SPLITS.items():
            _draw(axis, run.curve(f"{prefix}/{metric}"), name, color)
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    figure.suptitle(run.name, fontsize=12)
    _save(figure, out)


def plot_runs(runs: Sequence[RunHistory], out: Path) -> None:
    """Draw training loss and validation top-1 of each run; raises as `plot_run`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (key, label) in zip(axes, _PANELS_OF_SEVERAL_RUNS.items(), strict=True):
        for number, run in enumerate(runs):
            color = _RUN_COLORS[number % len(_RUN_COLORS)]
            _draw(axis, run.curve(key), run.name, color)
        axis.set_ylabel(label)
        axis.set_xlabel("epoch")
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    _save(figure, out)


def _draw(axis: "Axes", curve: Curve, name: str, color: str) -> None:
    if not curve.values:
        return
    axis.plot(
        curve.epochs,
        curve.values,
        color=color,
        linewidth=1.5,
        marker="o" if len(curve.values) <= _MOST_MARKERS else None,
        markersize=3,
        label=f"{name}: {curve.values[-1]:.4g} at the end",
    )


def _save(figure: "Figure", out: Path) -> None:
    for axis in figure.axes:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
