"""`resnet-dist report`: what came out of a run, or of several beside each other, from metrics.jsonl
alone.
"""

import argparse
import math
import statistics
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from resnet_dist.metrics_file import read_metrics

_COLORS = ("#1f5fa8", "#c8501e", "#3a8a4d", "#8a5fb0", "#8a8a8a", "#b08a1f")
_SPLITS = {
    "train": ("train", "#8a8a8a"),
    "val": ("val", "#1f5fa8"),
    "val_ema": ("val, EMA", "#c8501e"),
}
"""Name and color of what the keys of metrics.jsonl begin with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "output_dir",
        nargs="+",
        help="folder of a run, with its metrics.jsonl; several are compared",
    )
    parser.add_argument(
        "--out", default=None, metavar="PNG", help="the picture; default: metrics.png in the first"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and draw the picture where matplotlib is installed; 0, or 2 when there is
    nothing to report.
    """
    runs: dict[Path, list[dict]] = {}
    for folder in map(Path, args.output_dir):
        try:
            runs[folder] = read_metrics(folder / "metrics.jsonl")
        except OSError as error:
            print(
                f"error: {folder} has no readable metrics.jsonl ({error.strerror}): name the output_dir of a run"
            )
            return 2
        if not runs[folder]:
            print(
                f"error: {folder / 'metrics.jsonl'} has no line yet: the run has not logged anything"
            )
            return 2
    folder, records = next(iter(runs.items()))
    print(summary(records, folder) if len(runs) == 1 else comparison(runs))
    out = Path(args.out) if args.out else folder / "metrics.png"
    try:
        if len(runs) == 1:
            plot(records, folder.absolute().name, out)
        else:
            plot_comparison(runs, out)
        print(f"picture: {out}")
    except ImportError:
        print("no picture, since matplotlib is not installed: pip install resnet-dist[report]")
    except (OSError, ValueError) as error:
        print(f"error: the picture {out} cannot be written: {error}; --out names another file")
        return 2
    return 0


def series(records: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The epochs at which `key` has a number, and the numbers."""
    points = [
        (record["train/epoch"], record[key])
        for record in records
        if record.get(key) is not None and record.get("train/epoch") is not None
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]


def summary(records: list[dict], folder: Path) -> str:
    """The table: final and best accuracy of raw and averaged weights, length, speed."""
    epochs = series(records, "train/epoch")[0]
    lines = {
        "run": folder,
        "length": f"{records[-1]['step']} steps, {max(epochs, default=0):.2f} epochs, {_duration(records)}",
    }
    for prefix in ("val", "val_ema"):
        where, top1 = series(records, f"{prefix}/top1")
        _, top5 = series(records, f"{prefix}/top5")
        found = list(zip(top1, top5, where, strict=False))
        for name, at in (
            (("final", found[-1]), ("best", max(found, key=lambda one: one[0]))) if found else ()
        ):
            lines[f"{_SPLITS[prefix][0]} {name}"] = (
                "top-1 {:6.2f} %   top-5 {:6.2f} %   at epoch {:.2f}".format(*at)
            )
    _, speed = series(records, "train/images_per_second")
    _, waits = series(records, "train/data_wait_fraction")
    _, bad = series(records, "train/bad_images")
    if speed:
        lines["speed"] = f"{statistics.median(speed):.0f} images/s (median)"
    if waits:
        lines["data wait"] = f"{100 * statistics.median(waits):.1f} % of the time (median)"
    if bad and bad[-1]:
        lines["bad images"] = f"{bad[-1]:.0f}"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}   {value}" for name, value in lines.items())


def comparison(runs: dict[Path, list[dict]]) -> str:
    """A row for each run: length, the training loss of the last log line, final and best accuracy."""
    width = max(len(folder.absolute().name) for folder in runs)
    lines = [f"{'run':{width}}  epochs     time  train loss  val top-1  val top-5  best top-1"]
    for folder, records in runs.items():
        loss, top1, top5 = (
            series(records, key)[1] for key in ("train/loss", "val/top1", "val/top5")
        )
        numbers = [
            loss[-1] if loss else math.nan,
            *((top1[-1], top5[-1], max(top1)) if top1 else [math.nan] * 3),
        ]
        epochs, time = (
            max(series(records, "train/epoch")[0], default=0),
            _duration(records).split()[0],
        )
        lines.append(
            f"{folder.absolute().name:{width}}  {epochs:6.2f}  {time:>7}  "
            "{:10.4f}  {:9.2f}  {:9.2f}  {:10.2f}".format(*numbers)
        )
    return "\n".join(lines)


def _duration(records: list[dict]) -> str:
    """Time that the processes of the run took, without the breaks between them and without what was
    done anew.
    """
    timed = [record for record in records if "elapsed" in record]
    starts = [record["time"] - record["elapsed"] for record in timed]
    # Lines of one process agree on when it began, to within the clocks' drift; the last of them has
    # its length.
    lengths = [
        record["elapsed"]
        for record, (start, after) in zip(timed, pairwise([*starts, math.inf]), strict=True)
        if abs(after - start) > 2
    ]
    runs = f" in {len(lengths)} runs" if len(lengths) > 1 else ""
    return f"{timedelta(seconds=round(sum(lengths)))} h{runs}"


def plot(records: list[dict], title: str, out: Path) -> None:
    """Draw loss, top-1, learning rate and speed against the epoch. Raises ImportError without
    matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = {
        "loss": "loss (cross-entropy, nats)",
        "top1": "top-1 (%)",
        "lr": "learning rate",
        "images_per_second": "images per second, all ranks",
    }
    for axis, (metric, label) in zip(axes.flat, panels.items(), strict=True):
        for prefix, (name, color) in _SPLITS.items():
            where, values = series(records, f"{prefix}/{metric}")
            if values:
                axis.plot(
                    where,
                    values,
                    color=color,
                    linewidth=1.5,
                    marker="o" if len(values) <= 40 else None,
                    markersize=3,
                    label=f"{name}: {values[-1]:.4g} at the end",
                )
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    figure.suptitle(title, fontsize=12)
    _save(figure, out)


def plot_comparison(runs: dict[Path, list[dict]], out: Path) -> None:
    """Draw training loss and validation top-1 of each run against the epoch. Raises ImportError
    without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {"train/loss": "training loss (nats)", "val/top1": "validation top-1 (%)"}
    for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, (folder, records) in enumerate(runs.items()):
            where, values = series(records, key)
            if values:
                axis.plot(
                    where,
                    values,
                    color=_COLORS[number % len(_COLORS)],
                    linewidth=1.5,
                    markersize=3,
                    marker="o" if len(values) <= 40 else None,
                    label=f"{folder.absolute().name}: {values[-1]:.4g} at the end",
                )
        axis.set_ylabel(label)
        axis.set_xlabel("epoch")
        axis.legend(frameon=False, fontsize=9)
    _save(figure, out)


def _save(figure, out: Path) -> None:
    for axis in figure.axes:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
