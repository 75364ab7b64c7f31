"""`resnet-dist models`: all networks with parameters, GFLOPs and published accuracy.

GFLOPs are multiply-adds for one image of the size beside them, as papers count. Top-1 accuracy in
percent is what others published, on ImageNet unless it says CIFAR-10; docs/results.md has what this
project measured.

The figures come from models/figures.json, so that the command neither builds a network nor imports
torch.
"""

import argparse
import importlib.util
import json
import sys
from importlib import resources
from typing import Any

from resnet_dist.text import did_you_mean

Row = dict[str, Any]
"""The figures of one network by their names."""

# Widths of columns, in characters.
_NAME_WIDTH = 19
_STAGES_WIDTH = 24
_HEADER = "  ".join(
    [
        "name".ljust(_NAME_WIDTH),
        "params/M",
        "size",
        " GFLOPs",
        "stages".ljust(_STAGES_WIDTH),
        "top-1",
        "published in",
    ]
)


def run(options: argparse.Namespace) -> int:
    """Print the table of the networks whose name contains `options.filter`.

    Args:
        options: `filter`, a part of the name; `json`, whether to print one JSON object per line.

    Returns:
        The exit code: 0, or 2 if no name contains the filter.
    """
    figures = read_figures()
    names = [name for name in figures if options.filter in name]
    if not names:
        similar = did_you_mean(options.filter, list(figures))
        print(f"error: no network has {options.filter!r} in its name{similar}", file=sys.stderr)
        return 2
    if not options.json:
        print(_HEADER)
    for name in names:
        row = _make_row(name, figures[name])
        if options.json:
            print(json.dumps(row))
        else:
            print(_format_row(row))
    return 0


def read_figures() -> dict[str, Row]:
    """Read the figures of every network.

    Returns:
        For each name, what `models.figures.measure_network` returned.
    """
    file = resources.files("resnet_dist.models") / "figures.json"
    text = file.read_text(encoding="utf-8")
    figures: dict[str, Row] = json.loads(text)
    return figures


def _make_row(name: str, figures: Row) -> Row:
    """Select the figures of a network that are printed.

    Returns:
        The name and the figures, or the name and an error if an optional library is missing.
    """
    figures = dict(figures)
    library = figures.pop("library")
    if library and importlib.util.find_spec(library) is None:
        way_out = f"pip install 'resnet-dist[{library}]'"
        error = f"model.name is {name!r}, which needs {library}: {way_out}"
        return {"name": name, "error": error}
    return {"name": name, **figures}


def _format_row(row: Row) -> str:
    """One line of the table."""
    name = row["name"].ljust(_NAME_WIDTH)
    if "error" in row:
        return f"{name}  {row['error']}"
    millions = row["parameters"] / 1e6
    gflops = row["multiply_adds"] / 1e9
    top1 = "-"
    if row["top1"]:
        top1 = f"{row['top1']:.2f}"
    columns = [
        name,
        f"{millions:8.2f}",
        f"{row['size']:4}",
        f"{gflops:7.2f}",
        row["stages"].ljust(_STAGES_WIDTH),
        top1.rjust(5),
        row["source"],
    ]
    return "  ".join(columns).rstrip()
