"""The report as one HTML page: no network, no script, light and dark, readable on a phone."""

import json
from collections.abc import Sequence
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

_WIDTH = 480
_HEIGHT = 240
_MARGIN = 60

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
    """The page about one or several runs; `differences` are sentences about their accuracies."""
    title = ", ".join(run.name for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _legend(runs),
        _evaluation_table(runs),
        *(f"<p>{escape(sentence)}</p>" for sentence in differences),
        '<div class="panels">',
        *(_panel(runs, key, label) for key, label in _PANELS.items()),
        "</div>",
        _settings_table(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _legend(runs: Sequence[RunHistory]) -> str:
    names = [
        f'<span style="color:{_color(number)}">&#9632;</span> {escape(run.name)}'
        for number, run in enumerate(runs)
    ]
    return f"<p>{' &nbsp; '.join(names)}</p>"


def _evaluation_table(runs: Sequence[RunHistory]) -> str:
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
    interval = last.interval
    bounds = "" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"
    top5 = "" if last.top5 is None else f"{last.top5:.2f}"
    return [name, weights, f"{last.epoch:.2f}", f"{last.top1:.2f}", bounds, top5]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _panel(runs: Sequence[RunHistory], key: str, label: str) -> str:
    """One diagram; empty if no run has the key."""
    curves = [run.curve(key) for run in runs]
    if not any(curve.values for curve in curves):
        return ""
    right = max(epoch for curve in curves for epoch in curve.epochs) or 1.0
    low = min(value for curve in curves for value in curve.values)
    high = max(value for curve in curves for value in curve.values)
    if high == low:
        high = low + 1.0
    lines = [
        _polyline(curve, right, low, high, _color(number)) for number, curve in enumerate(curves)
    ]
    bottom = _HEIGHT - _MARGIN / 2
    frame = (
        f'<path d="M{_MARGIN} 8V{bottom}H{_WIDTH}" fill="none" stroke="currentColor" '
        'stroke-opacity="0.4"/>'
        f'<text x="{_MARGIN - 4}" y="16" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_MARGIN - 4}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">epoch {right:.3g}</text>'
    )
    return (
        f"<figure><figcaption>{escape(label)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{frame}{''.join(lines)}</svg></figure>"
    )


def _polyline(curve: Curve, right: float, low: float, high: float, color: str) -> str:
    bottom = _HEIGHT - _MARGIN / 2
    points = []
    for epoch, value in zip(curve.epochs, curve.values, strict=True):
        x = _MARGIN + epoch / right * (_WIDTH - _MARGIN)
        y = bottom - (value - low) / (high - low) * (bottom - 8)
        points.append(f"{x:.1f},{y:.1f}")
    joined = " ".join(points)
    return f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def _settings_table(runs: Sequence[RunHistory]) -> str:
    """All settings of one run, or those in which several differ."""
    settings = [_read_settings(run) for run in runs]
    keys = sorted({key for each in settings for key in each})
    rows = []
    for key in keys:
        values = [printable(each.get(key, "")) for each in settings]
        if len(runs) == 1 or len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return ""
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    return f"<h2>{title}</h2>" + _table(["key", *(run.name for run in runs)], rows)


def _read_settings(run: RunHistory) -> dict[str, str]:
    """config.yaml as "section.key" -> value; empty if there is none that can be read."""
    try:
        tree = yaml.safe_load((run.folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    flat: dict[str, str] = {}
    if isinstance(tree, dict):
        _flatten(tree, "", flat)
    return flat


def _flatten(tree: dict[str, Any], prefix: str, flat: dict[str, str]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", flat)
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
