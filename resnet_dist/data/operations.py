"""The pixel operations of the augmentation, in one table by name.

An entry of `OPERATIONS` says everything about an operation: its range in each policy, how the
parameter follows from the strength, the matrix that DALI gets, and the DALI operators that carry it
out. To add an operation, write its DALI form and its entry here; nothing else has to know it.

The laws are torchvision's. The results are torchvision's to within 2 levels: for the geometric
operations and hue those of its uint8 tensors, else those of Pillow. Two differences remain.
Sharpness filters the outermost pixels as well. Equalize is exact where Pillow's step, a whole
number of pixels, is coarse.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resnet_dist.data.arrays import FloatArray, IntArray

DaliNode = Any
"""A node of a DALI graph that is being defined."""


@dataclass(frozen=True)
class StrengthRange:
    """The largest strength of an operation in a policy."""

    largest: float = 0.0
    of_side: bool = False
    """whether `largest` is a fraction of the image's side"""

    def in_pixels(self, side: int) -> float:
        """The largest strength for an image of `side` pixels."""
        return self.largest * side if self.of_side else self.largest


# How a parameter follows from the level (0 to 1, the strength as a fraction of the largest one),
# the sign (-1 or 1) and the largest strength.
Law = Callable[[FloatArray, IntArray, float], FloatArray]


def _zero(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The operation has no parameter."""
    return np.zeros_like(level)


def _signed(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """Tangent of a shear, or degrees of a rotation."""
    return largest * level * sign


def _whole_pixels(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """Pixels of a translation."""
    return np.trunc(_signed(level, sign, largest))


def _factor(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """Factor of brightness, color, contrast or sharpness; 1 changes nothing."""
    return 1 + _signed(level, sign, largest)


def _bits(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """Bits that posterize keeps."""
    bits: FloatArray = 8 - np.rint(level * largest)
    return bits


def _threshold(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """Value from which solarize inverts."""
    return 255 * (1 - level)


# The matrices [m, 3, 3] of m parameters. A geometric operation maps (x, y, 1) in the result, in
# pixels from the corner, to the place in the image. Sharpness has the matrix of a filter. The
# others have their parameter at [0, 0].
MatrixOf = Callable[[FloatArray, int], FloatArray]


def _corner(params: FloatArray, side: int) -> FloatArray:
    matrices = np.zeros((len(params), 3, 3))
    matrices[:, 0, 0] = params
    return matrices


def _identity_matrices(count: int) -> FloatArray:
    return np.tile(np.eye(3), (count, 1, 1))


def _shear_x(params: FloatArray, side: int) -> FloatArray:
    matrices = _identity_matrices(len(params))
    matrices[:, 0, 1] = params
    return matrices


def _shear_y(params: FloatArray, side: int) -> FloatArray:
    matrices = _identity_matrices(len(params))
    matrices[:, 1, 0] = params
    return matrices


def _translate_x(params: FloatArray, side: int) -> FloatArray:
    matrices = _identity_matrices(len(params))
    matrices[:, 0, 2] = -params
    return matrices


def _translate_y(params: FloatArray, side: int) -> FloatArray:
    matrices = _identity_matrices(len(params))
    matrices[:, 1, 2] = -params
    return matrices


def _rotate(params: FloatArray, side: int) -> FloatArray:
    """Rotation around the centre; degrees, counter-clockwise."""
    angle = np.deg2rad(params)
    cos = np.cos(angle)
    sin = np.sin(angle)
    half = side / 2
    matrices = _identity_matrices(len(params))
    matrices[:, 0] = np.stack([cos, -sin, half * (1 - cos + sin)], axis=1)
    matrices[:, 1] = np.stack([sin, cos, half * (1 - cos - sin)], axis=1)
    return matrices


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
"""Pillow's filter SMOOTH, which sharpness blends with the image."""
_UNCHANGED = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def _sharpness_filter(params: FloatArray, side: int) -> FloatArray:
    return _SMOOTH + params[:, None, None] * (_UNCHANGED - _SMOOTH)


# The DALI forms: uint8 HWC pixels to the same. `matrix` is the operation's matrix, in host memory.
# `on_gpu` says where the pixels are. Each returns what is added to the graph.
DaliForm = Callable[[DaliNode, DaliNode, bool], DaliNode]

# Pillow and torchvision truncate where DALI rounds: half a level less gives the same.
_TRUNCATE = -0.49


def _beside_pixels(matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """The matrix in the memory of the pixels, for a formula that holds both."""
    return matrix.gpu() if on_gpu else matrix


def _to_uint8(values: DaliNode) -> DaliNode:
    from nvidia.dali import fn, types

    return fn.cast(values, dtype=types.UINT8)


def _to_gray(pixels: DaliNode) -> DaliNode:
    from nvidia.dali import fn, types

    return fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)


def _white() -> DaliNode:
    from nvidia.dali import types

    return types.Constant(255, dtype=types.UINT8)


def _blend(pixels: DaliNode, other: DaliNode, share: DaliNode) -> DaliNode:
    """Share * pixels + (1 - share) * other, in 16 bits, where nothing is clipped."""
    from nvidia.dali import fn, types

    kept = fn.brightness(pixels, brightness=share, dtype=types.INT16)
    rest = fn.brightness(
        other, brightness=1 - share, brightness_shift=_TRUNCATE / 32767, dtype=types.INT16
    )
    return _to_uint8(kept + rest)


def _dali_identity(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    return pixels


def _dali_warp(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """All geometric operations."""
    from nvidia.dali import fn

    if on_gpu:
        return fn.warp_affine(pixels, matrix=matrix[:2], fill_value=0.0)
    # OpenCV takes 0.3 ms for an image of 224 pixels, warp_affine 2.6 ms on the CPU.
    return fn.experimental.warp_perspective(pixels, matrix=matrix, fill_value=[0.0])


def _dali_brightness(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import fn

    return fn.brightness(pixels, brightness=matrix[0, 0], brightness_shift=_TRUNCATE / 255)


def _dali_color(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import fn, types

    gray = fn.color_space_conversion(_to_gray(pixels), image_type=types.GRAY, output_type=types.RGB)
    return _blend(pixels, gray, matrix[0, 0])


def _dali_contrast(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import fn

    mean = fn.reductions.mean(_to_gray(pixels), keep_dims=True)
    return _blend(pixels, mean, matrix[0, 0])


def _dali_sharpness(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import fn

    return fn.filter(pixels, _beside_pixels(matrix, on_gpu))


def _dali_posterize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import math

    bits = _beside_pixels(matrix, on_gpu)[0, 0]
    return pixels & _to_uint8(256 - math.pow(2.0, 8 - bits))


def _dali_solarize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    threshold = _beside_pixels(matrix, on_gpu)[0, 0]
    return pixels ^ (pixels >= threshold) * _white()


def _dali_autocontrast(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    from nvidia.dali import fn

    low = fn.reductions.min(pixels, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(pixels, axis_names="HW", keep_dims=True)
    # A channel of a single value stays as it is.
    is_flat = high == low
    return _to_uint8((pixels - low * (high > low)) * (255 / (high - low + is_flat * _white())))


def _dali_equalize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """DALI's is OpenCV's. Pillow's law is the same on the inverted image."""
    from nvidia.dali import fn

    white = _white()
    return fn.equalize(pixels ^ white) ^ white


def _dali_invert(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    return pixels ^ _white()


def _dali_hue(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Turn the hue of HSV around its hexagon, on which red is at 0, green at 2 and blue at 4."""
    from nvidia.dali import fn, math

    turns = _beside_pixels(matrix, on_gpu)[0, 0]
    red, green, blue = (pixels[:, :, i : i + 1] * 1.0 for i in range(3))
    high = math.max(red, math.max(green, blue))
    span = high - math.min(red, math.min(green, blue))

    # The largest channel; where two are equal, the first of red, green, blue.
    is_red = red == high
    is_green = (green == high) & (red != high)
    is_blue = is_red == is_green
    difference = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    place = difference / math.max(span, 1.0) + is_green * 2 + is_blue * 4 + turns * 6
    place = place - math.floor(place / 6) * 6

    shares = (math.fabs(place - 3) - 1, 2 - math.fabs(place - 2), 2 - math.fabs(place - 4))
    turned = [high - span + span * math.clamp(share, 0.0, 1.0) for share in shares]
    return _to_uint8(fn.cat(*turned, axis=2))


@dataclass(frozen=True)
class Operation:
    """One operation on the pixels of an image."""

    name: str
    dali_form: DaliForm
    law: Law = _zero
    matrix_of: MatrixOf = _corner
    ranges: Mapping[str, StrengthRange] = field(default_factory=dict)
    """the largest strength in each policy that draws the operation"""


def _ranges(usual: StrengthRange, wide: StrengthRange) -> dict[str, StrengthRange]:
    """RandAugment and AutoAugment share their ranges; TrivialAugmentWide has wider ones."""
    return {"randaugment": usual, "autoaugment": usual, "trivialaugment": wide}


_NO_RANGE = _ranges(StrengthRange(), StrengthRange())
_SHEAR = _ranges(StrengthRange(0.3), StrengthRange(0.99))
_TRANSLATION = _ranges(StrengthRange(150 / 331, of_side=True), StrengthRange(32))
_ROTATION = _ranges(StrengthRange(30), StrengthRange(135))
_FACTOR = _ranges(StrengthRange(0.9), StrengthRange(0.99))
_POSTERIZE = _ranges(StrengthRange(4), StrengthRange(6))

# A policy picks by place among the operations that have a range in it: the order is torchvision's,
# and a resumed run needs it to stay as it is. New operations come last.
_TABLE = (
    Operation("identity", _dali_identity, ranges=_NO_RANGE),
    Operation("shear_x", _dali_warp, _signed, _shear_x, _SHEAR),
    Operation("shear_y", _dali_warp, _signed, _shear_y, _SHEAR),
    Operation("translate_x", _dali_warp, _whole_pixels, _translate_x, _TRANSLATION),
    Operation("translate_y", _dali_warp, _whole_pixels, _translate_y, _TRANSLATION),
    Operation("rotate", _dali_warp, _signed, _rotate, _ROTATION),
    Operation("brightness", _dali_brightness, _factor, ranges=_FACTOR),
    Operation("color", _dali_color, _factor, ranges=_FACTOR),
    Operation("contrast", _dali_contrast, _factor, ranges=_FACTOR),
    Operation("sharpness", _dali_sharpness, _factor, _sharpness_filter, _FACTOR),
    Operation("posterize", _dali_posterize, _bits, ranges=_POSTERIZE),
    Operation("solarize", _dali_solarize, _threshold, ranges=_NO_RANGE),
    Operation("autocontrast", _dali_autocontrast, ranges=_NO_RANGE),
    Operation("equalize", _dali_equalize, ranges=_NO_RANGE),
    Operation("invert", _dali_invert, ranges={"autoaugment": StrengthRange()}),
    # Drawn by the colour jitter alone, in turns of the colour circle.
    Operation("hue", _dali_hue),
)

OPERATIONS = {operation.name: operation for operation in _TABLE}
NAMES = tuple(OPERATIONS)
"""The operations by their id."""
DALI_FORMS = tuple(dict.fromkeys(operation.dali_form for operation in _TABLE))
"""The different DALI forms: the branches of the graph."""
BRANCH_OF_OP = np.array([DALI_FORMS.index(operation.dali_form) for operation in _TABLE], np.int32)
"""int32: the place in `DALI_FORMS` of each operation id."""


def operation_ids(names: Iterable[str]) -> IntArray:
    """The ids of operations. Raises KeyError for a name that is not in the table."""
    numbers = {name: number for number, name in enumerate(NAMES)}
    return np.array([numbers[name] for name in names], np.int64)


def drawn_by(policy: str) -> IntArray:
    """The ids of the operations that a policy picks from, in its order."""
    return operation_ids(name for name in NAMES if policy in OPERATIONS[name].ranges)


def parameters(
    policy: str, ops: IntArray, levels: FloatArray, signs: IntArray, side: int
) -> FloatArray:
    """The parameters of operations that a policy has drawn.

    Args:
        policy: one of `augment.policy`.
        ops: int64 [n, K], operation ids.
        levels: float64 [n, K], the strength as a fraction of the largest, 0 to 1.
        signs: [n, K], -1 or 1.
        side: side of the square images, in pixels.

    Returns:
        float64 [n, K], each in the unit of its operation.
    """
    params = np.zeros(ops.shape)
    for op, chosen in _by_operation(ops):
        largest = op.ranges[policy].in_pixels(side)
        params[chosen] = op.law(levels[chosen], signs[chosen], largest)
    return params


def matrices(ops: IntArray, params: FloatArray, side: int) -> FloatArray:
    """The matrices of operations with the given parameters, [n, K] both; float32 [n, K, 3, 3].

    Shears keep the corner of the image and rotations its centre, as in torchvision.
    """
    found = np.zeros((*ops.shape, 3, 3), np.float32)
    for op, chosen in _by_operation(ops):
        found[chosen] = op.matrix_of(params[chosen], side)
    return found


def _by_operation(ops: IntArray) -> Iterable[tuple[Operation, np.ndarray[Any, Any]]]:
    """Each operation that occurs in `ops`, with the mask of its places."""
    for number in np.flatnonzero(np.bincount(ops.ravel(), minlength=len(NAMES))):
        yield OPERATIONS[NAMES[number]], ops == number
