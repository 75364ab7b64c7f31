"""The part of the report's HTML page about an evaluation: classes, calibration and images."""

from collections.abc import Sequence

from resnet_dist.commands.report_charts import histogram, reliability_diagram
from resnet_dist.commands.report_input import Evaluated
from resnet_dist.commands.report_markup import element, folded, table, text
from resnet_dist.evaluation.calibration import Calibration, TemperatureScaling
from resnet_dist.evaluation.confusion import ClassResult
from resnet_dist.evaluation.evaluation_file import EvaluationDetails, GalleryEntry
from resnet_dist.evaluation.intervals import Interval, wilson_interval

# How much of a table is shown at once.
_FIRST_ROWS = 10

# With more classes the matrix would not be readable.
_MOST_CLASSES_OF_A_MATRIX = 20

# A cell with few images must still be seen.
_PALEST_CELL = 8


def evaluation_section(
    evaluated: Evaluated,
    heading: str,
) -> str:
    """Everything about one evaluation.

    Args:
        evaluated: The evaluation.
        heading: The title of the section.
    """
    parts = [
        text("h2", heading),
        text("p", _describe(evaluated)),
        element("div", _cards(evaluated), class_="cards"),
    ]
    if evaluated.details is not None:
        parts.extend(_detail_parts(evaluated.details))
    return element("section", "".join(parts))


def _detail_parts(details: EvaluationDetails) -> list[str]:
    """What only an evaluation.json has: calibration, classes, confusions and images."""
    parts = []
    if details.calibration is not None:
        parts.append(_calibration(details.calibration))
    parts.extend(
        [
            _classes(details),
            _confusions(details),
            _gallery("Most confident mistakes", details.mistakes, details),
            _gallery("Least confident hits", details.hits, details),
        ]
    )
    return parts


def _describe(evaluated: Evaluated) -> str:
    """What was evaluated on what, in a sentence."""
    network = evaluated.network
    num_images = len(evaluated.is_hit)
    num_classes = len(network.class_names)
    sentence = (
        f"{network.name}, {network.weights} weights of step {network.step}, "
        f"on {num_images} images of {num_classes} classes."
    )
    num_unreadable = 0
    if evaluated.details is not None:
        num_unreadable = evaluated.details.num_unreadable
    if num_unreadable:
        sentence += f" {num_unreadable} images could not be decoded and count as misses."
    return sentence


def _cards(evaluated: Evaluated) -> str:
    """The most important figures."""
    top1_card = _accuracy_card("top-1", evaluated.interval)
    cards = [top1_card]
    if evaluated.network.has_top5:
        num_images = len(evaluated.is_hit)
        top5 = wilson_interval(evaluated.num_top5_hits, num_images)
        top5_card = _accuracy_card("top-5", top5)
        cards.append(top5_card)
    details = evaluated.details
    if details is not None and details.calibration is not None:
        cards.extend(_calibration_cards(details.calibration))
    return "".join(cards)


def _accuracy_card(
    name: str,
    interval: Interval,
) -> str:
    """An accuracy with its interval."""
    value = f"{interval.value:.2f} %"
    bounds = f"95 %: {interval.low:.2f} to {interval.high:.2f}"
    return _card(name, value, bounds)


def _calibration_cards(calibration: Calibration) -> list[str]:
    """The figures of the calibration, and of a temperature."""
    ece = 100 * calibration.ece
    ece_equal_mass = 100 * calibration.ece_equal_mass
    cards = [
        _card(
            "calibration error (ECE)",
            f"{ece:.2f} %",
            f"15 bins; of equal mass: {ece_equal_mass:.2f} %",
        ),
        _card("NLL", f"{calibration.loss:.4f}", "nats"),
        _card("Brier score", f"{calibration.brier:.4f}", "from 0 (best) to 2"),
    ]
    if calibration.scaling is not None:
        cards.append(_temperature_card(calibration.scaling))
    return cards


def _temperature_card(scaling: TemperatureScaling) -> str:
    """The best temperature, and what it changes."""
    ece_before = f"{100 * scaling.ece_before:.2f}"
    ece_after = f"{100 * scaling.ece_after:.2f}"
    loss_before = f"{scaling.loss_before:.4f}"
    loss_after = f"{scaling.loss_after:.4f}"
    note = (
        f"on the other half: ECE {ece_before} to {ece_after} %, NLL {loss_before} to {loss_after}"
    )
    if scaling.is_at_the_edge:
        note += "; the best one lies outside of what was tried"
    temperature = f"{scaling.temperature:.2f}"
    return _card("best temperature", temperature, note)


def _card(
    name: str,
    value: str,
    note: str,
) -> str:
    """A figure with its name and a note."""
    lines = [
        text("span", name),
        text("strong", value),
        text("small", note),
    ]
    return element("div", "".join(lines), class_="card")


def _calibration(calibration: Calibration) -> str:
    """The reliability diagram, and how often each confidence occurs."""
    title = text("h3", "Calibration")
    diagram = reliability_diagram(calibration.bins)
    counts = histogram("images per bin of confidence", calibration.bins)
    panels = element("div", diagram + counts, class_="panels")
    return title + panels


def _classes(details: EvaluationDetails) -> str:
    """A table of the classes, the worst first."""
    header = ["class", "images", "top-1 (%)"]
    if details.network.has_top5:
        header.append("top-5 (%)")
    header.append("mean confidence (%)")
    rows = [_class_row(each, details) for each in details.classes]
    first_rows = rows[:_FIRST_ROWS]
    title = text("h3", "Classes, the worst first")
    first = table(header, first_rows)
    rest = _folded_rest("classes", header, rows)
    return title + first + rest


def _folded_rest(
    name: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric_from: int = 1,
) -> str:
    """The rows of a table that are not shown at once; empty if all are.

    Args:
        name: What the rows are.
        header: The titles of the columns.
        rows: All rows.
        numeric_from: The first column with numbers.
    """
    rest = rows[_FIRST_ROWS:]
    if not rest:
        return ""
    summary = f"{len(rest)} more {name}"
    return folded(summary, table(header, rest, numeric_from))


def _class_row(
    result: ClassResult,
    details: EvaluationDetails,
) -> list[str]:
    """The cells of a class."""
    network = details.network
    top1 = 100 * result.correct1 / result.num
    cells = [
        network.class_names[result.label],
        str(result.num),
        f"{top1:.1f}",
    ]
    if network.has_top5:
        top5 = 100 * result.correct5 / result.num
        cells.append(f"{top5:.1f}")
    confidence = 100 * result.confidence
    cells.append(f"{confidence:.1f}")
    return cells


def _confusions(details: EvaluationDetails) -> str:
    """The most frequent confusions, and the matrix if it is small."""
    title = text("h3", "Confusions")
    if not details.confusions:
        return title + text("p", "None.")
    header = ["images of", "are taken for", "images"]
    rows = _confusion_rows(details)
    first_rows = rows[:_FIRST_ROWS]
    pairs = table(header, first_rows, numeric_from=2)
    num_classes = len(details.network.class_names)
    if num_classes <= _MOST_CLASSES_OF_A_MATRIX:
        pairs += _matrix(details)
    pairs_and_matrix = element("div", pairs, class_="side")
    rest = _folded_rest("pairs", header, rows, numeric_from=2)
    return title + pairs_and_matrix + rest


def _confusion_rows(details: EvaluationDetails) -> list[list[str]]:
    """The cells of each confusion: the class, what its images are taken for, and how many."""
    names = details.network.class_names
    rows = []
    for each in details.confusions:
        row = [
            names[each.label],
            names[each.predicted],
            str(each.num),
        ]
        rows.append(row)
    return rows


def _matrix(details: EvaluationDetails) -> str:
    """The confusion matrix: a row for each class, a column for each prediction."""
    names = details.network.class_names
    counts_of_classes = _count_predictions(details)
    header = text("th", "class \\ prediction")
    for name in names:
        header += text("th", name, class_="n")
    rows = element("tr", header)
    for name, counts in zip(names, counts_of_classes, strict=True):
        rows += _matrix_row(name, counts)
    matrix = element("table", rows, class_="matrix")
    return element("div", matrix, class_="scroll")


def _matrix_row(
    name: str,
    counts: Sequence[int],
) -> str:
    """The row of a class, with how many of its images are taken for each class."""
    total = sum(counts)
    cells = text("th", name)
    for count in counts:
        cells += _matrix_cell(count, total)
    return element("tr", cells)


def _count_predictions(details: EvaluationDetails) -> list[list[int]]:
    """How many images of each class (first index) are taken for each class (second index)."""
    num_classes = len(details.network.class_names)
    counts = []
    for _ in range(num_classes):
        counts.append([0] * num_classes)
    for result in details.classes:
        counts[result.label][result.label] = result.correct1
    for each in details.confusions:
        counts[each.label][each.predicted] = each.num
    return counts


def _matrix_cell(
    count: int,
    total: int,
) -> str:
    """A cell, whose color shows its share of the images of the class."""
    if not count:
        return element("td", class_="n")
    percent = round(100 * count / total)
    shown = max(_PALEST_CELL, percent)
    return text("td", str(count), class_="n", style=f"--share:{shown}%")


def _gallery(
    title: str,
    entries: Sequence[GalleryEntry],
    details: EvaluationDetails,
) -> str:
    """Images with their classes; empty if there are none."""
    if not entries:
        return ""
    names = details.network.class_names
    figures = []
    for entry in entries:
        figure = _gallery_figure(entry, names)
        figures.append(figure)
    heading = text("h3", title)
    gallery = element("div", "".join(figures), class_="gallery")
    return heading + gallery


def _gallery_figure(
    entry: GalleryEntry,
    names: Sequence[str],
) -> str:
    """One image with its prediction, and with its class if that is another one."""
    image = element(
        "img",
        src=f"data:image/png;base64,{entry.png}",
        alt=entry.path,
        title=entry.path,
    )
    predicted = names[entry.predicted]
    percent = 100 * entry.confidence
    content = image + text("figcaption", f"{predicted}, {percent:.1f} %")
    if entry.label != entry.predicted:
        label = names[entry.label]
        content += text("figcaption", f"is {label}")
    return element("figure", content)
