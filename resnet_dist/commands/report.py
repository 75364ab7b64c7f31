"""`resnet-dist report`: what came out of a run, as a table and a picture, from its metrics.jsonl alone."""

import argparse
import statistics
from pathlib import Path

from resnet_dist.log import read_metrics

_GREY = "#8a8a8a"
_COLORS = {"train": _GREY, "val": "#1f5fa8", "val_ema": "#c8501e"}
_NAMES = {"train": "train", "val": "val", "val_ema": "val, EMA"}


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
        plot(records, f"{folder.absolute().name}", out)
    except ImportError:
        print("no picture, since matplotlib is not installed: pip install resnet-dist[report]")
    except (OSError, ValueError) as error:
        print(f"error: the picture {out} cannot be written: {error}; --out names another file")
        return 2
    else:
        print(f"picture: {out}")
    return 0


def series(records: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The epochs at which `key` has a number, and the numbers."""
    points = [(record["train/epoch"], record[key]) for record in records
              if record.get(key) is not None and record.get("train/epoch") is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def summary(records: list[dict], folder: Path) -> str:
    """The table: final and best accuracy of raw and averaged weights, length, speed."""
    epochs = [record["train/epoch"] for record in records if record.get("train/epoch") is not None]
    lines = [("run", str(folder)),
             ("length", f"{records[-1]['step']} steps, {max(epochs, default=0):.2f} epochs, {_duration(records)}")]
    for prefix, title in (("val", "val"), ("val_ema", "val, EMA")):
        where, top1 = series(records, f"{prefix}/top1")
        top5 = series(records, f"{prefix}/top5")[1]
        if not top1 or len(top5) != len(top1):
            continue
        best = max(range(len(top1)), key=top1.__getitem__)
        for name, at in (("final", len(top1) - 1), ("best", best)):
            lines.append((f"{title} {name}", f"top-1 {top1[at]:6.2f} %   top-5 {top5[at]:6.2f} %   "
                                             f"at epoch {where[at]:.2f}"))
    speed = series(records, "train/images_per_second")[1]
    waits = series(records, "train/data_wait_fraction")[1]
    if speed:
        lines.append(("speed", f"{statistics.median(speed):.0f} images/s (median)"))
    if waits:
        lines.append(("data wait", f"{100 * statistics.median(waits):.1f} % of the time (median)"))
    bad = series(records, "train/bad_images")[1]
    if bad and bad[-1]:
        lines.append(("bad images", f"{bad[-1]:.0f}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in lines)


def _duration(records: list[dict]) -> str:
    """Time that the processes of the run took, without the breaks between them and without what was done anew."""
    last: dict[int, float] = {}
    for record in records:
        if "time" in record and "elapsed" in record:
            # Lines of one process agree on when it began, to within the clocks' drift.
            began = record["time"] - record["elapsed"]
            known = next((start for start in last if abs(start - began) < 2), began)
            last[known] = record["elapsed"]
    seconds = round(sum(last.values()))
    runs = f" in {len(last)} runs" if len(last) > 1 else ""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} h{runs}"


def plot(records: list[dict], title: str, out: Path) -> None:
    """Draw loss, top-1, learning rate and speed against the epoch. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, metric, label, unit, corner in ((axes[0, 0], "loss", "loss (cross-entropy, nats)", "", "upper right"),
                                              (axes[0, 1], "top1", "top-1 (%)", " %", "lower right")):
        for prefix, color in _COLORS.items():
            where, values = series(records, f"{prefix}/{metric}")
            if values:
                marker = "o" if prefix != "train" and len(values) <= 40 else None
                axis.plot(where, values, color=color, linewidth=1.2 if prefix == "train" else 1.8, marker=marker,
                          markersize=3, label=f"{_NAMES[prefix]}: {values[-1]:.4g}{unit} at the end")
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9, loc=corner)
    for axis, key, label in ((axes[1, 0], "train/lr", "learning rate"),
                             (axes[1, 1], "train/images_per_second", "images per second, all ranks")):
        axis.plot(*series(records, key), color=_COLORS["val"], linewidth=1.5)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(out, dpi=120)
