"""Charts of the report's HTML page, as inline SVG.

Colors come from the classes `c0` to `c5` of the page's style sheet, so that they follow the light
or dark mode. Lengths are in units of the view box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from resnet_dist.calibration import Bin
from resnet_dist.history import Curve

NUM_COLORS = 6
"""Number of colors in the style sheet; more lines use them again."""

_WIDTH = 400
_HEIGHT = 220
_LEFT = 52
_RIGHT = _WIDTH - 10
_TOP = 10
_BOTTOM = _HEIGHT - 28

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
        share = (value - self.left) / (self.right - self.left)
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        """The vertical coordinate of a value; it grows downward."""
        share = (value - self.low) / (self.high - self.low)
        return _BOTTOM - share * (_BOTTOM - _TOP)


def line_chart(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
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
        parts.append(_polyline(line, scale))
    return _figure(title, parts)


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """The accuracy of each bin of confidence, beside the diagonal of perfect calibration.

    The opacity of a bar grows with the number of its images.

    Args:
        bins: Bins of equal width, from 0 to 1.
    """
    scale = _Scale(0.0, 1.0, 0.0, 1.0)
    parts = [_axes(scale, "confidence")]
    largest = max(each.num for each in bins)
    for number, each in enumerate(bins):
        if not each.num:
            continue
        left = scale.x(number / len(bins))
        right = scale.x((number + 1) / len(bins))
        top = scale.y(each.accuracy)
        opacity = 0.35 + 0.65 * math.sqrt(each.num / largest)
        tip = (
            f"{each.num} images, confidence {100 * each.confidence:.1f} %, "
            f"accuracy {100 * each.accuracy:.1f} %"
        )
        parts.append(
            f'<rect class="c0" x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{_BOTTOM - top:.1f}" fill-opacity="{opacity:.2f}"><title>{tip}</title></rect>'
        )
        center = scale.x(each.confidence)
        height = scale.y(each.accuracy)
        parts.append(f'<circle class="mark" cx="{center:.1f}" cy="{height:.1f}" r="2.5"/>')
    parts.append(
        f'<path class="diagonal" d="M{scale.x(0):.1f} {scale.y(0):.1f}'
        f'L{scale.x(1):.1f} {scale.y(1):.1f}"/>'
    )
    return _figure("accuracy against confidence", parts)


def histogram(title: str, bins: Sequence[Bin]) -> str:
    """The number of images in each bin of confidence.

    Args:
        title: What is shown.
        bins: Bins of equal width, from 0 to 1.
    """
    largest = max(each.num for each in bins)
    scale = _Scale(0.0, 1.0, 0.0, float(max(1, largest)))
    parts = [_axes(scale, "confidence")]
    for number, each in enumerate(bins):
        left = scale.x(number / len(bins))
        right = scale.x((number + 1) / len(bins))
        top = scale.y(each.num)
        parts.append(
            f'<rect class="c0" x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{_BOTTOM - top:.1f}"><title>{each.num} images</title></rect>'
        )
    return _figure(title, parts)


def _figure(title: str, parts: Sequence[str]) -> str:
    """A figure with a caption."""
    caption = escape(title)
    drawing = "".join(parts)
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{caption}">'
        f"{drawing}</svg></figure>"
    )


def _scale_of(lines: Sequence[Line], from_zero: bool) -> _Scale:
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
    return _Scale(0.0, max(epochs) or 1.0, low, high)


def ticks(low: float, high: float) -> list[float]:
    """Four to six round numbers between `low` and `high`, which differ."""
    raw_step = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = 10 * power
    for factor in (1, 2, 5):
        if factor * power >= raw_step:
            step = factor * power
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axes(scale: _Scale, horizontal: str) -> str:
    """Grid lines with their numbers, and the name of the horizontal axis."""
    parts = []
    for value in ticks(scale.low, scale.high):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for value in ticks(scale.left, scale.right):
        x = scale.x(value)
        parts.append(
            f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{_number(value)}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 2}" text-anchor="middle">{escape(horizontal)}</text>'
    )
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
    return "".join(parts)


def _number(value: float) -> str:
    """A number of an axis, as short as possible."""
    if value and (abs(value) >= 100_000 or abs(value) < 0.001):
        return f"{value:.0e}"
    return f"{value:.4g}"


def _polyline(line: Line, scale: _Scale) -> str:
    """The line through the points, and marks with tool tips if there are few."""
    points = []
    marks = []
    color = f"c{line.color % NUM_COLORS}"
    for epoch, value in zip(line.curve.epochs, line.curve.values, strict=True):
        x = scale.x(epoch)
        y = scale.y(value)
        points.append(f"{x:.1f},{y:.1f}")
        tip = f"{line.name}, epoch {epoch:.4g}: {value:.5g}"
        marks.append(
            f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>{escape(tip)}</title></circle>"
        )
    if len(marks) > _MOST_MARKS:
        marks = []
    joined = " ".join(points)
    return f'<polyline class="{color}" points="{joined}"/>' + "".join(marks)
