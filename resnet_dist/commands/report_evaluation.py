"""The part of the report's HTML page about an evaluation: classes, calibration and images."""

from collections.abc import Sequence
from html import escape

from resnet_dist.calibration import Calibration
from resnet_dist.commands.report_charts import histogram, reliability_diagram
from resnet_dist.commands.report_input import Evaluated
from resnet_dist.commands.report_tables import folded, table
from resnet_dist.confusion import ClassResult
from resnet_dist.evaluation_file import EvaluationDetails, GalleryEntry
from resnet_dist.intervals import wilson_interval

# How much of a list is shown at once.
_FIRST_CLASSES = 10
_FIRST_CONFUSIONS = 10

# With more classes the matrix would not be readable.
_MOST_CLASSES_OF_A_MATRIX = 20


def evaluation_section(evaluated: Evaluated, heading: str) -> str:
    """Everything about one evaluation.

    Args:
        evaluated: The evaluation.
        heading: The title of the section.
    """
    parts = [f"<h2>{escape(heading)}</h2>", _figures(evaluated)]
    details = evaluated.details
    if details is not None:
        if details.calibration is not None:
            parts.append(_calibration(details.calibration))
        parts.append(_classes(details))
        parts.append(_confusions(details))
        parts.append(_gallery("Most confident mistakes", details.mistakes, details))
        parts.append(_gallery("Least confident hits", details.hits, details))
    body = "".join(parts)
    return f'<section class="evaluation">{body}</section>'


def _figures(evaluated: Evaluated) -> str:
    """What was evaluated, and its accuracy."""
    network = evaluated.network
    num = len(evaluated.is_hit)
    interval = evaluated.interval
    cards = [
        _card(
            "top-1", f"{interval.value:.2f} %", f"95 %: {interval.low:.2f} to {interval.high:.2f}"
        )
    ]
    if len(network.class_names) > 5:
        top5 = wilson_interval(evaluated.num_top5_hits, num)
        cards.append(
            _card("top-5", f"{top5.value:.2f} %", f"95 %: {top5.low:.2f} to {top5.high:.2f}")
        )
    unreadable = ""
    if evaluated.details is not None:
        cards.extend(_calibration_cards(evaluated.details.calibration))
        if evaluated.details.num_unreadable:
            unreadable = (
                f" {evaluated.details.num_unreadable} images could not be decoded and count as "
                "misses."
            )
    text = (
        f"{network.name}, {network.weights} weights of step {network.step}, on {num} images of "
        f"{len(network.class_names)} classes.{unreadable}"
    )
    return f'<p>{escape(text)}</p><div class="cards">{"".join(cards)}</div>'


def _calibration_cards(calibration: Calibration | None) -> list[str]:
    """The figures of the calibration, and of a temperature."""
    if calibration is None:
        return []
    cards = [
        _card(
            "calibration error (ECE)",
            f"{100 * calibration.ece:.2f} %",
            f"15 bins; of equal mass: {100 * calibration.ece_equal_mass:.2f} %",
        ),
        _card("NLL", f"{calibration.loss:.4f}", "nats"),
        _card("Brier score", f"{calibration.brier:.4f}", "from 0 (best) to 2"),
    ]
    scaling = calibration.scaling
    if scaling is not None:
        note = (
            f"on the other half: ECE {100 * scaling.ece_before:.2f} to "
            f"{100 * scaling.ece_after:.2f} %, NLL {scaling.loss_before:.4f} to "
            f"{scaling.loss_after:.4f}"
        )
        if scaling.is_at_the_edge:
            note += "; the best one lies outside of what was tried"
        cards.append(_card("best temperature", f"{scaling.temperature:.2f}", note))
    return cards


def _card(name: str, value: str, note: str) -> str:
    """A figure with its name and a note."""
    return (
        f'<div class="card"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
    )


def _calibration(calibration: Calibration) -> str:
    """The reliability diagram, and how often each confidence occurs."""
    diagram = reliability_diagram(calibration.bins)
    counts = histogram("images per bin of confidence", calibration.bins)
    return f'<h3>Calibration</h3><div class="panels">{diagram}{counts}</div>'


def _classes(details: EvaluationDetails) -> str:
    """A table of the classes, the worst first."""
    header = ["class", "images", "top-1 (%)", "top-5 (%)", "mean confidence (%)"]
    rows = [_class_row(each, details) for each in details.classes]
    first = table(header, rows[:_FIRST_CLASSES])
    rest = rows[_FIRST_CLASSES:]
    text = f"<h3>Classes, the worst first</h3>{first}"
    if rest:
        text += folded(f"{len(rest)} more classes", table(header, rest))
    return text


def _class_row(result: ClassResult, details: EvaluationDetails) -> list[str]:
    """The cells of a class."""
    return [
        details.network.class_names[result.label],
        str(result.num),
        f"{100 * result.correct1 / result.num:.1f}",
        f"{100 * result.correct5 / result.num:.1f}",
        f"{100 * result.confidence:.1f}",
    ]


def _confusions(details: EvaluationDetails) -> str:
    """The most frequent confusions, and the matrix if it is small."""
    if not details.confusions:
        return "<h3>Confusions</h3><p>None.</p>"
    names = details.network.class_names
    header = ["images of", "are taken for", "images"]
    rows = []
    for each in details.confusions:
        rows.append([names[each.label], names[each.predicted], str(each.num)])
    text = "<h3>Confusions</h3>"
    pairs = table(header, rows[:_FIRST_CONFUSIONS], numeric_from=2)
    if len(names) <= _MOST_CLASSES_OF_A_MATRIX:
        pairs += _matrix(details)
    text += f'<div class="side">{pairs}</div>'
    rest = rows[_FIRST_CONFUSIONS:]
    if rest:
        content = table(header, rest, numeric_from=2)
        text += folded(f"{len(rest)} more pairs", content)
    return text


def _matrix(details: EvaluationDetails) -> str:
    """The confusion matrix: a row for each class, a column for each prediction."""
    names = details.network.class_names
    counts = [[0] * len(names) for _ in names]
    for result in details.classes:
        counts[result.label][result.label] = result.correct1
    for each in details.confusions:
        counts[each.label][each.predicted] = each.num
    header = "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    lines = [f"<tr><th>class \\ prediction</th>{header}</tr>"]
    for name, row in zip(names, counts, strict=True):
        total = max(1, sum(row))
        cells = "".join(_matrix_cell(count, total) for count in row)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="matrix">{"".join(lines)}</table></div>'


def _matrix_cell(count: int, total: int) -> str:
    """A cell, whose color shows its share of the images of the class."""
    if not count:
        return '<td class="n"></td>'
    percent = round(100 * count / total)
    return f'<td class="n" style="--share:{max(8, percent)}%">{count}</td>'


def _gallery(title: str, entries: Sequence[GalleryEntry], details: EvaluationDetails) -> str:
    """Images with their classes."""
    if not entries:
        return ""
    names = details.network.class_names
    figures = []
    for entry in entries:
        predicted = escape(names[entry.predicted])
        label = escape(names[entry.label])
        caption = f"{predicted}, {100 * entry.confidence:.1f} %"
        if entry.label != entry.predicted:
            caption = f"{predicted}, {100 * entry.confidence:.1f} %<br/>is {label}"
        path = escape(entry.path)
        figures.append(
            f'<figure><img src="data:image/png;base64,{escape(entry.png)}" alt="{path}" '
            f'title="{path}"/><figcaption>{caption}</figcaption></figure>'
        )
    joined = "".join(figures)
    return f'<h3>{escape(title)}</h3><div class="gallery">{joined}</div>'
