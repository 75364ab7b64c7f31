"""Write the report as one HTML page.

The page loads nothing from the network and has no script. It follows the light or dark mode of the
browser, and its width suits a phone as well as a screen.
"""

import statistics
from collections.abc import Sequence

from resnet_dist.commands.report_charts import NUM_COLORS, Line, line_chart
from resnet_dist.commands.report_evaluation import evaluation_section
from resnet_dist.commands.report_input import Evaluated, ReportedRun
from resnet_dist.commands.report_markup import color_legend, element, folded, table, text
from resnet_dist.commands.report_text import (
    describe_differences,
    describe_pair,
    describe_slow_ranks,
)
from resnet_dist.logs.history import Curve, Evaluation
from resnet_dist.text import printable

_PANELS = {
    "train/loss": "training loss (nats)",
    "val/loss": "validation loss (nats)",
    "train/top1": "training top-1 (%)",
    "val/top1": "validation top-1 (%)",
    "val_ema/top1": "validation top-1 of the averaged weights (%)",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/images_per_second": "images per second, all ranks",
    "train/data_wait_fraction": "share of the time that training waits for data",
    "train/memory_gib": "memory, the largest of a rank (GiB)",
}

_PANELS_OF_RANKS = {
    "ranks/data_seconds": "waiting for data (ms per step)",
    "ranks/step_seconds": "step (ms)",
    "ranks/probe_seconds": "a fixed matrix product (ms)",
    "ranks/memory_gib": "memory (GiB)",
}

# Panels whose vertical axis begins at 0.
_FROM_ZERO = ("train/lr", "train/images_per_second", "train/data_wait_fraction", "train/memory_gib")

# With more ranks than this, only the fastest, the middle and the slowest are drawn.
_MOST_LINES_OF_RANKS = 8

_STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --muted: #5c6470; --page: #fff;
  --card: #f4f5f7; --line: #d9dce1; --c0: #2563b0; --c1: #c2541a; --c2: #2f8a4b;
  --c3: #8a55b8; --c4: #0c8089; --c5: #8f6a14; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --muted: #9aa3af;
  --page: #14171b; --card: #1e2228; --line: #363c45; --c0: #6ea8ee; --c1: #f0935a;
  --c2: #6cc68a; --c3: #c39aee; --c4: #5fc7cf; --c5: #d6b35c; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 0 auto; padding: 16px;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 8px 0; } h2 { font-size: 20px; margin: 36px 0 8px; }
h3 { font-size: 16px; margin: 24px 0 8px; } a { color: var(--c0); }
p { margin: 8px 0; } ul { padding-left: 20px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; list-style: none; }
.dot { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 16px; }
figure { margin: 0; } .chart { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.chart figcaption { font-weight: 600; font-size: 14px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11.5px; }
svg polyline { stroke-width: 1.8; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--muted); fill: none; }
.diagonal { stroke: var(--muted); stroke-dasharray: 5 4; fill: none; }
.mark { fill: var(--page); stroke: var(--text); }
.cards { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.card span, .card small { display: block; color: var(--muted); font-size: 13px; }
.card strong { font-size: 20px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
td { overflow-wrap: normal; } th, .n { white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.matrix th, .matrix td { padding: 3px 7px; border: 1px solid var(--line); }
.matrix td { background: color-mix(in srgb, var(--c0) calc(0.6 * var(--share, 0%)), transparent); }
.side { display: flex; flex-wrap: wrap; gap: 16px 40px; align-items: flex-start; }
.side > * { max-width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr));
  gap: 12px; }
.gallery img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated;
  border-radius: 4px; background: var(--card); }
.gallery figcaption { font-size: 13px; line-height: 1.35; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--c0); }
"""


def render_runs(runs: Sequence[ReportedRun]) -> str:
    """Return the HTML page about one or several runs."""
    names = [run.name for run in runs]
    links = [run.wandb_url for run in runs]
    parts = [
        color_legend(names, NUM_COLORS, links),
        _evaluation_table(runs),
        _findings(runs),
        text("h2", "Curves"),
        _panels(runs),
    ]
    for run in runs:
        parts.append(_ranks(run))
    for run in runs:
        if run.evaluation is not None:
            parts.append(evaluation_section(run.evaluation, f"Evaluation of {run.name}"))
    parts.append(_settings(runs))
    return _page(", ".join(names), parts)


def render_evaluations(files: Sequence[Evaluated]) -> str:
    """Return the HTML page about one or several evaluations."""
    parts = []
    sentences = [describe_pair(files[0], other) for other in files[1:]]
    parts.append(_list_of_sentences(sentences))
    for each in files:
        parts.append(evaluation_section(each, each.name))
    title = ", ".join(each.name for each in files)
    return _page(title, parts)


def _page(
    title: str,
    parts: Sequence[str],
) -> str:
    """The page with its head and its style."""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        text("title", title),
        element("style", _STYLE + _style_of_colors()),
    ]
    body = "\n".join(part for part in parts if part)
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        element("head", "".join(head)),
        element("body", text("h1", title) + body),
        "</html>",
        "",
    ]
    return "\n".join(lines)


def _style_of_colors() -> str:
    """The part of the style sheet about the colors of lines."""
    rules = []
    for number in range(NUM_COLORS):
        color = f"var(--c{number})"
        rules.append(f".c{number} {{ fill: {color}; }}")
        rules.append(f"polyline.c{number} {{ fill: none; stroke: {color}; }}")
        rules.append(f".dot.c{number} {{ background: {color}; }}")
    return "\n".join(rules)


def _evaluation_table(runs: Sequence[ReportedRun]) -> str:
    """The last evaluation of each run, with raw and with averaged weights."""
    rows = []
    for run in runs:
        for prefix, weights in (("val", "raw"), ("val_ema", "averaged")):
            evaluations = run.history.evaluations(prefix)
            if evaluations:
                rows.append(_evaluation_row(run.name, weights, evaluations))
    if not rows:
        return text("p", "No evaluation yet.")
    # There is no top-5 accuracy with fewer than six classes.
    titles = list(rows[0])
    if not any(row["top-5 (%)"] for row in rows):
        titles.remove("top-5 (%)")
    lines = []
    for row in rows:
        cells = [row[title] for title in titles]
        lines.append(cells)
    return table(titles, lines, numeric_from=2)


def _evaluation_row(
    name: str,
    weights: str,
    evaluations: Sequence[Evaluation],
) -> dict[str, str]:
    """The last of several evaluations, by the title of the column; what is not known is empty."""
    last = evaluations[-1]
    best = max(evaluation.top1 for evaluation in evaluations)
    bounds = ""
    if last.interval is not None:
        bounds = f"{last.interval.low:.2f} to {last.interval.high:.2f}"
    top5 = ""
    if last.top5 is not None:
        top5 = f"{last.top5:.2f}"
    return {
        "run": name,
        "weights": weights,
        "epoch": f"{last.epoch:.2f}",
        "top-1 (%)": f"{last.top1:.2f}",
        "95 % interval": bounds,
        "top-5 (%)": top5,
        "best (%)": f"{best:.2f}",
    }


def _findings(runs: Sequence[ReportedRun]) -> str:
    """What the figures say, in sentences."""
    sentences = describe_differences(runs)
    for run in runs:
        for sentence in describe_slow_ranks(run.history):
            sentences.append(f"{run.name}: {sentence}")
        sentences.extend(run.remarks)
    return _list_of_sentences(sentences)


def _list_of_sentences(sentences: Sequence[str]) -> str:
    """A list; empty without sentences."""
    if not sentences:
        return ""
    items = []
    for sentence in sentences:
        items.append(text("li", printable(sentence)))
    return element("ul", "".join(items))


def _panels(runs: Sequence[ReportedRun]) -> str:
    """A chart of each quantity, with a line for each run."""
    charts = []
    for key, label in _PANELS.items():
        lines = []
        for number, run in enumerate(runs):
            lines.append(Line(run.name, run.history.curve(key), number))
        charts.append(line_chart(label, lines, from_zero=key in _FROM_ZERO))
    return element("div", "".join(charts), class_="panels")


def _ranks(run: ReportedRun) -> str:
    """Data wait, step time, probe and memory of each rank; empty for a single rank."""
    num_ranks = len(run.history.curves_of_ranks("ranks/data_seconds"))
    if num_ranks < 2:
        return ""
    charts = []
    for key, title in _PANELS_OF_RANKS.items():
        curves = run.history.curves_of_ranks(key)
        if key.endswith("_seconds"):
            curves = [_in_milliseconds(curve) for curve in curves]
        charts.append(line_chart(title, _lines_of_ranks(curves), from_zero=True))
    findings = describe_slow_ranks(run.history)
    if not findings:
        findings = ["no rank is much slower than the others"]
    sentence = (
        f"{num_ranks} ranks: {'; '.join(findings)}. Ranks wait for each other in every step, so "
        "that a slow one makes the steps of all longer. Its data wait or its time for a fixed "
        "matrix product is above that of the others."
    )
    names = [f"rank {rank}" for rank in range(num_ranks)]
    if num_ranks > _MOST_LINES_OF_RANKS:
        names = ["the fastest rank", "the middle one", "the slowest one"]
    parts = [
        text("h2", f"Ranks of {run.name}"),
        text("p", sentence),
        color_legend(names, NUM_COLORS),
        element("div", "".join(charts), class_="panels"),
    ]
    return "".join(parts)


def _in_milliseconds(curve: Curve) -> Curve:
    """A curve of seconds, in milliseconds."""
    return Curve(curve.epochs, [1000 * value for value in curve.values])


def _lines_of_ranks(curves: Sequence[Curve]) -> list[Line]:
    """A line for each rank; of many ranks the fastest, the middle and the slowest by median."""
    ranks = list(range(len(curves)))
    if len(ranks) > _MOST_LINES_OF_RANKS:
        medians = [statistics.median(curve.values) for curve in curves]
        ranks.sort(key=medians.__getitem__)
        ranks = [ranks[0], ranks[len(ranks) // 2], ranks[-1]]
    lines = []
    for number, rank in enumerate(ranks):
        lines.append(Line(f"rank {rank}", curves[rank], number))
    return lines


def _settings(runs: Sequence[ReportedRun]) -> str:
    """The settings in which several runs differ, and all settings to unfold."""
    keys: set[str] = set()
    for run in runs:
        keys.update(run.settings)
    rows = []
    different = []
    for key in sorted(keys):
        values = [printable(run.settings.get(key, "")) for run in runs]
        rows.append([key, *values])
        if len(set(values)) > 1:
            different.append([key, *values])
    if not rows:
        return ""
    header = ["key", *(run.name for run in runs)]
    parts = [text("h2", "Settings")]
    if different:
        parts.append(text("h3", "Differences"))
        parts.append(table(header, different, numeric_from=len(header)))
    all_settings = table(header, rows, numeric_from=len(header))
    parts.append(folded(f"all {len(rows)} settings", all_settings))
    return "".join(parts)
