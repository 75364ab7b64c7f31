"""`resnet-dist report`: what came out of a run, as a table and a picture, from its metrics.jsonl alone."""

import argparse
import math
import statistics
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from resnet_dist.log import read_metrics

_SPLITS = {"train": ("train", "#8a8a8a"), "val": ("val", "#1f5fa8"), "val_ema": ("val, EMA", "#c8501e")}
"""Name and color of what the keys of metrics.jsonl begin with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("output_dir", help="folder of the run, which holds metrics.jsonl")
    parser.add_argument("--out", default=None, metavar="PNG", help="the picture; default: metrics.png in output_dir")


def run(args: argparse.Namespace) -> int:
    """Print the table and draw the picture where matplotlib is installed; 0, or 2 when there is nothing to report."""
    folder = Path(args.output_dir)
    try:
        records = read_metrics(folder / "metrics.jsonl")
    except OSError as error:
        print(f"error: {folder} has no readable metrics.jsonl ({error.strerror}): name the output_dir of a run")
        return 2
    if not records:
        print(f"error: {folder / 'metrics.jsonl'} has no line yet: the run has not logged anything")
        return 2
    print(summary(records, folder))
    out = Path(args.out) if args.out else folder / "metrics.png"
    try:
        plot(records, folder.absolute().name, out)
        print(f"picture: {out}")
    except ImportError:
        print("no picture, since matplotlib is not installed: pip install resnet-dist[report]")
    except (OSError, ValueError) as error:
        print(f"error: the picture {out} cannot be written: {error}; --out names another file")
        return 2
    return 0


def series(records: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The epochs at which `key` has a number, and the numbers."""
    points = [(record["train/epoch"], record[key]) for record in records
              if record.get(key) is not None and record.get("train/epoch") is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def summary(records: list[dict], folder: Path) -> str:
    """The table: final and best accuracy of raw and averaged weights, length, speed."""
    epochs = series(records, "train/epoch")[0]
    lines = {"run": folder,
             "length": f"{records[-1]['step']} steps, {max(epochs, default=0):.2f} epochs, {_duration(records)}"}
    for prefix in ("val", "val_ema"):
        where, top1 = series(records, f"{prefix}/top1")
        _, top5 = series(records, f"{prefix}/top5")
        found = list(zip(top1, top5, where, strict=False))
        for name, at in (("final", found[-1]), ("best", max(found, key=lambda one: one[0]))) if found else ():
            lines[f"{_SPLITS[prefix][0]} {name}"] = "top-1 {:6.2f} %   top-5 {:6.2f} %   at epoch {:.2f}".format(*at)
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


def _duration(records: list[dict]) -> str:
    """Time that the processes of the run took, without the breaks between them and without what was done anew."""
    timed = [record for record in records if "elapsed" in record]
    starts = [record["time"] - record["elapsed"] for record in timed]
    # Lines of one process agree on when it began, to within the clocks' drift; the last of them has its length.
    lengths = [record["elapsed"] for record, (start, after) in zip(timed, pairwise([*starts, math.inf]), strict=True)
               if abs(after - start) > 2]
    runs = f" in {len(lengths)} runs" if len(lengths) > 1 else ""
    return f"{timedelta(seconds=round(sum(lengths)))} h{runs}"


def plot(records: list[dict], title: str, out: Path) -> None:
    """Draw loss, top-1, learning rate and speed against the epoch. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = {"loss": "loss (cross-entropy, nats)", "top1": "top-1 (%)", "lr": "learning rate",
              "images_per_second": "images per second, all ranks"}
    for axis, (metric, label) in zip(axes.flat, panels.items(), strict=True):
        for prefix, (name, color) in _SPLITS.items():
            where, values = series(records, f"{prefix}/{metric}")
            if values:
                axis.plot(where, values, color=color, linewidth=1.5, marker="o" if len(values) <= 40 else None,
                          markersize=3, label=f"{name}: {values[-1]:.4g} at the end")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(out, dpi=120)
