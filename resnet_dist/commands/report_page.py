"""Write the report as one HTML page.

The page loads nothing from the network and has no script. It follows the light or dark mode of the
browser, and its width suits a phone as well as a screen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from resnet_dist.history import Curve, Evaluation, RunHistory
from resnet_dist.text import printable

_COLORS = ("#2f6fb5", "#d0602a", "#3f9a55", "#9468bd", "#8a8a8a", "#b8952c")

_PANELS = {
    "train/loss": "training loss (nats)",
    "val/top1": "validation top-1 (%)",
    "train/lr": "learning rate",
    "train/images_per_second": "images per second, all ranks",
    "train/data_wait_fraction": "share of the time that training waits for data",
}

# The size of a panel and the edges of its axes, in units of its view box.
_WIDTH = 480
_HEIGHT = 240
_MARGIN = 60
_TOP = 8
_BOTTOM = _HEIGHT - _MARGIN / 2

_STYLE = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 0 auto; padding: 16px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 16px; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); }
"""


def render_page(runs: Sequence[RunHistory], differences: Sequence[str]) -> str:
    """Return the HTML page about one or several runs.

    Args:
        runs: The metrics of each run.
        differences: Sentences that compare the accuracies of the runs.
    """
    names = ", ".join(run.name for run in runs)
    title = escape(names)
    parts = [
        f"<h1>{title}</h1>",
        _legend(runs),
        _evaluation_table(runs),
    ]
    for sentence in differences:
        parts.append(f"<p>{escape(sentence)}</p>")
    parts.append('<div class="panels">')
    for key, label in _PANELS.items():
        panel = _panel(runs, key, label)
        parts.append(panel)
    parts.append("</div>")
    parts.append(_settings_table(runs))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _color(number: int) -> str:
    """Return the color of a run; the colors repeat after the last one."""
    return _COLORS[number % len(_COLORS)]


def _legend(runs: Sequence[RunHistory]) -> str:
    """Return the names of the runs beside their colors."""
    entries = []
    for number, run in enumerate(runs):
        color = _color(number)
        name = escape(run.name)
        entries.append(f'<span style="color:{color}">&#9632;</span> {name}')
    joined = " &nbsp; ".join(entries)
    return f"<p>{joined}</p>"


def _evaluation_table(runs: Sequence[RunHistory]) -> str:
    """Return a table of the last evaluation of each run, with raw and with averaged weights."""
    rows = []
    for run in runs:
        for prefix, weights in (("val", "raw"), ("val_ema", "averaged")):
            evaluations = run.evaluations(prefix)
            if evaluations:
                rows.append(_evaluation_row(run.name, weights, evaluations[-1]))
    if not rows:
        return "<p>No evaluation yet.</p>"
    header = ["run", "weights", "epoch", "top-1 (%)", "95 % interval", "top-5 (%)"]
    return _table(header, rows)


def _evaluation_row(name: str, weights: str, last: Evaluation) -> list[str]:
    """Return the cells of an evaluation; one that is not known is empty."""
    epoch = f"{last.epoch:.2f}"
    top1 = f"{last.top1:.2f}"
    bounds = ""
    if last.interval is not None:
        bounds = f"{last.interval.low:.2f} to {last.interval.high:.2f}"
    top5 = ""
    if last.top5 is not None:
        top5 = f"{last.top5:.2f}"
    return [name, weights, epoch, top1, bounds, top5]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of plain text."""
    lines = [_table_row("th", header)]
    for row in rows:
        lines.append(_table_row("td", row))
    joined = "".join(lines)
    return f'<div class="scroll"><table>{joined}</table></div>'


def _table_row(tag: str, cells: Sequence[str]) -> str:
    parts = [f"<{tag}>{escape(cell)}</{tag}>" for cell in cells]
    joined = "".join(parts)
    return f"<tr>{joined}</tr>"


@dataclass(frozen=True)
class _Scale:
    """The part of the plane that a panel shows: epochs from 0 to `right`, values `low` to `high`.

    Coordinates are in units of the panel's view box.
    """

    right: float
    low: float
    high: float

    def x(self, epoch: float) -> float:
        """The horizontal coordinate of an epoch."""
        width = _WIDTH - _MARGIN
        return _MARGIN + epoch / self.right * width

    def y(self, value: float) -> float:
        """The vertical coordinate of a value; it grows downward."""
        height = _BOTTOM - _TOP
        share = (value - self.low) / (self.high - self.low)
        return _BOTTOM - share * height


def _scale_of(curves: Sequence[Curve]) -> _Scale:
    """Return the scale that shows all points of the curves."""
    epochs: list[float] = []
    values: list[float] = []
    for curve in curves:
        epochs.extend(curve.epochs)
        values.extend(curve.values)
    right = max(epochs) or 1.0
    low = min(values)
    high = max(values)
    if high == low:
        high = low + 1.0
    return _Scale(right, low, high)


def _panel(runs: Sequence[RunHistory], key: str, label: str) -> str:
    """Return the diagram of a metric, with a curve for each run; empty if no run has it."""
    curves = [run.curve(key) for run in runs]
    if not any(curve.values for curve in curves):
        return ""
    scale = _scale_of(curves)
    parts = [_frame(scale)]
    for number, curve in enumerate(curves):
        line = _polyline(curve, scale, _color(number))
        parts.append(line)
    drawing = "".join(parts)
    caption = escape(label)
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{caption}">'
        f"{drawing}</svg></figure>"
    )


def _frame(scale: _Scale) -> str:
    """Return the axes, with the largest and the smallest value and the last epoch."""
    left = _MARGIN - 4
    baseline = _HEIGHT - 6
    return (
        f'<path d="M{_MARGIN} {_TOP}V{_BOTTOM}H{_WIDTH}" fill="none" stroke="currentColor" '
        'stroke-opacity="0.4"/>'
        f'<text x="{left}" y="16" text-anchor="end">{scale.high:.3g}</text>'
        f'<text x="{left}" y="{_BOTTOM}" text-anchor="end">{scale.low:.3g}</text>'
        f'<text x="{_WIDTH}" y="{baseline}" text-anchor="end">epoch {scale.right:.3g}</text>'
    )


def _polyline(curve: Curve, scale: _Scale, color: str) -> str:
    """Return the line through the points of a curve."""
    points = []
    for epoch, value in zip(curve.epochs, curve.values, strict=True):
        x = scale.x(epoch)
        y = scale.y(value)
        points.append(f"{x:.1f},{y:.1f}")
    joined = " ".join(points)
    return f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def _settings_table(runs: Sequence[RunHistory]) -> str:
    """Return a table of the settings of one run, or of those in which several runs differ."""
    settings = [_read_settings(run) for run in runs]
    keys: set[str] = set()
    for each in settings:
        keys.update(each)
    rows = []
    for key in sorted(keys):
        values = [printable(each.get(key, "")) for each in settings]
        is_shown = len(runs) == 1 or len(set(values)) > 1
        if is_shown:
            rows.append([key, *values])
    if not rows:
        return ""
    title = "Settings"
    if len(runs) > 1:
        title = "Settings that differ"
    names = [run.name for run in runs]
    table = _table(["key", *names], rows)
    return f"<h2>{title}</h2>{table}"


def _read_settings(run: RunHistory) -> dict[str, str]:
    """Read config.yaml.

    Returns:
        The values as JSON, by "section.key"; empty if the file is missing or damaged.
    """
    path = run.folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    flat: dict[str, str] = {}
    if isinstance(tree, dict):
        _flatten(tree, "", flat)
    return flat


def _flatten(tree: dict[str, Any], prefix: str, flat: dict[str, str]) -> None:
    """Add the values of a tree to `flat`, with their keys joined by dots."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _flatten(value, f"{name}.", flat)
        else:
            flat[name] = json.dumps(value, default=str)
