"""Charts of the report's HTML page, as inline SVG.

Colors come from the classes `c0` to `c5` of the page's style sheet, so that they follow the light
or dark mode. Lengths are in units of the view box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.commands.report_markup import element, text
from resnet_dist.evaluation.calibration import Bin
from resnet_dist.logs.history import Curve

NUM_COLORS = 6
"""Number of colors in the style sheet; more lines use them again."""

_WIDTH = 400
_HEIGHT = 220
_LEFT = 52
_RIGHT = _WIDTH - 10
_TOP = 10
_BOTTOM = _HEIGHT - 28
_CHART_WIDTH = _RIGHT - _LEFT
_CHART_HEIGHT = _BOTTOM - _TOP

# More points than this get no mark of their own.
_MOST_MARKS = 60

_NUM_TICKS = 5


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    curve: Curve
    color: int


@dataclass(frozen=True)
class _Scale:
    """The part of the plane that a chart shows."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """The horizontal coordinate of a value."""
        extent = self.right - self.left
        share = (value - self.left) / extent
        return _LEFT + share * _CHART_WIDTH

    def y(self, value: float) -> float:
        """The vertical coordinate of a value; it grows downward."""
        extent = self.high - self.low
        share = (value - self.low) / extent
        return _BOTTOM - share * _CHART_HEIGHT


def line_chart(
    title: str,
    lines: Sequence[Line],
    from_zero: bool = False,
) -> str:
    """A chart of values against the epoch.

    Args:
        title: What is shown, with its unit.
        lines: The lines; those without points are left out.
        from_zero: Whether the vertical axis begins at 0.

    Returns:
        A figure; empty if no line has points.
    """
    shown = [line for line in lines if line.curve.values]
    if not shown:
        return ""
    scale = _scale_of(shown, from_zero)
    parts = [_axes(scale, "epoch")]
    for line in shown:
        parts.append(_draw_line(line, scale))
    return _figure(title, parts)


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """The accuracy of each bin of confidence, beside the diagonal of perfect calibration.

    The opacity of a bar grows with the number of its images.

    Args:
        bins: Bins of equal width, from 0 to 1.
    """
    scale = _Scale(
        left=0.0,
        right=1.0,
        low=0.0,
        high=1.0,
    )
    parts = [_axes(scale, "confidence")]
    largest = max(each.num for each in bins)
    for number, each in enumerate(bins):
        if not each.num:
            continue
        place = _place(number, len(bins))
        share = each.num / largest
        opacity = 0.35 + 0.65 * math.sqrt(share)
        tip = _describe_bin(each)
        bar = _bar(scale, place, each.accuracy, tip, opacity)
        mark = _mark(scale, each)
        parts.append(bar + mark)
    diagonal = _diagonal(scale)
    parts.append(diagonal)
    return _figure("accuracy against confidence", parts)


def _place(number: int, num_bins: int) -> tuple[float, float]:
    """The left and right end of a bin of equal width, from 0 to 1."""
    left = number / num_bins
    right = (number + 1) / num_bins
    return left, right


def _describe_bin(each: Bin) -> str:
    """The tool tip of a bin."""
    confidence = f"{100 * each.confidence:.1f} %"
    accuracy = f"{100 * each.accuracy:.1f} %"
    return f"{each.num} images, confidence {confidence}, accuracy {accuracy}"


def _mark(
    scale: _Scale,
    each: Bin,
) -> str:
    """A circle at the mean confidence and the accuracy of a bin."""
    x = scale.x(each.confidence)
    y = scale.y(each.accuracy)
    return element(
        "circle",
        class_="mark",
        cx=x,
        cy=y,
        r=2.5,
    )


def _diagonal(scale: _Scale) -> str:
    """The line on which the confidence equals the accuracy."""
    start = f"M{scale.x(0):.1f} {scale.y(0):.1f}"
    end = f"L{scale.x(1):.1f} {scale.y(1):.1f}"
    return element("path", class_="diagonal", d=start + end)


def histogram(
    title: str,
    bins: Sequence[Bin],
) -> str:
    """The number of images in each bin of confidence.

    Args:
        title: What is shown.
        bins: Bins of equal width, from 0 to 1.
    """
    largest = max(each.num for each in bins)
    high = float(max(1, largest))
    scale = _Scale(
        left=0.0,
        right=1.0,
        low=0.0,
        high=high,
    )
    parts = [_axes(scale, "confidence")]
    for number, each in enumerate(bins):
        place = _place(number, len(bins))
        bar = _bar(scale, place, each.num, f"{each.num} images")
        parts.append(bar)
    return _figure(title, parts)


def _bar(
    scale: _Scale,
    place: tuple[float, float],
    value: float,
    tip: str,
    opacity: float = 1.0,
) -> str:
    """A bar from 0 to `value`.

    Args:
        scale: The scale of the chart.
        place: The left and right end of the bar on the horizontal axis.
        value: Its height.
        tip: The text of its tool tip.
        opacity: From 0 to 1.
    """
    left, right = place
    x = scale.x(left) + 1
    y = scale.y(value)
    return element(
        "rect",
        text("title", tip),
        class_="c0",
        x=x,
        y=y,
        width=scale.x(right) - 1 - x,
        height=_BOTTOM - y,
        fill_opacity=f"{opacity:.2f}",
    )


def _figure(
    title: str,
    parts: Sequence[str],
) -> str:
    """A figure with a caption."""
    drawing = element(
        "svg",
        "".join(parts),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
    )
    caption = text("figcaption", title)
    return element("figure", caption + drawing, class_="chart")


def _scale_of(
    lines: Sequence[Line],
    from_zero: bool,
) -> _Scale:
    """The scale that shows all points."""
    epochs: list[float] = []
    values: list[float] = []
    for line in lines:
        epochs.extend(line.curve.epochs)
        values.extend(line.curve.values)
    low = min(values)
    high = max(values)
    if from_zero:
        low = min(0.0, low)
    if high == low:
        high = low + max(1.0, abs(low))
    right = max(epochs)
    if right <= 0:
        right = 1.0
    return _Scale(
        left=0.0,
        right=right,
        low=low,
        high=high,
    )


def ticks(
    low: float,
    high: float,
) -> list[float]:
    """Four to six round numbers between `low` and `high`, which differ."""
    smallest_step = (high - low) / _NUM_TICKS
    exponent = math.floor(math.log10(smallest_step))
    power = 10.0**exponent
    step = 10 * power
    for factor in (5, 2, 1):
        rounder_step = factor * power
        if rounder_step >= smallest_step:
            step = rounder_step
    # Rounding must not lose a tick at the ends.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axes(
    scale: _Scale,
    horizontal: str,
) -> str:
    """Grid lines with their numbers, and the name of the horizontal axis."""
    parts = []
    for value in ticks(scale.low, scale.high):
        y = scale.y(value)
        line = element("path", class_="grid", d=f"M{_LEFT} {y:.1f}H{_RIGHT}")
        number = _label(value, _LEFT - 6, y + 4, "end")
        parts.append(line + number)
    for value in ticks(scale.left, scale.right):
        x = scale.x(value)
        number = _label(value, x, _BOTTOM + 14, "middle")
        parts.append(number)
    center = (_LEFT + _RIGHT) / 2
    name = text(
        "text",
        horizontal,
        x=center,
        y=_HEIGHT - 2,
        text_anchor="middle",
    )
    parts.append(name)
    frame = f"M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"
    axis = element("path", class_="axis", d=frame)
    parts.append(axis)
    return "".join(parts)


def _label(
    value: float,
    x: float,
    y: float,
    anchor: str,
) -> str:
    """A number of an axis, as short as possible."""
    number = f"{value:.4g}"
    is_small = abs(value) < 0.001
    is_large = abs(value) >= 100_000
    if value and (is_small or is_large):
        number = f"{value:.0e}"
    return text("text", number, x=x, y=y, text_anchor=anchor)


def _draw_line(
    line: Line,
    scale: _Scale,
) -> str:
    """The line through the points, and marks with tool tips if there are few."""
    points = []
    marks = []
    color = f"c{line.color % NUM_COLORS}"
    for epoch, value in zip(line.curve.epochs, line.curve.values, strict=True):
        x = scale.x(epoch)
        y = scale.y(value)
        points.append(f"{x:.1f},{y:.1f}")
        tip = f"{line.name}, epoch {epoch:.4g}: {value:.5g}"
        mark = element(
            "circle",
            text("title", tip),
            class_=color,
            cx=x,
            cy=y,
            r=2.5,
        )
        marks.append(mark)
    drawing = element("polyline", class_=color, points=" ".join(points))
    if len(marks) > _MOST_MARKS:
        return drawing
    return drawing + "".join(marks)
