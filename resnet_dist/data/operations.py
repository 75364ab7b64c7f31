"""The pixel operations of the augmentation, in one table by name.

Each entry of `OPERATIONS` fully describes one operation: its range in each policy, how its
parameter is computed from the strength, the matrix that is passed to DALI, and the function of
`dali_operations.py` that adds it to the DALI graph. To add an operation, write that function and
the entry in this file. No other file has to change.

The parameters follow the formulas of torchvision, and those of `randaugment_increasing` the
formulas of timm (timm/data/auto_augment.py). The resulting pixels differ from torchvision's by
at most 2 levels. The reference is torchvision on uint8 tensors for the geometric operations and for
hue, and torchvision on PIL images for all others. Two differences remain:

- Sharpness also filters the pixels at the border of the image.
- Equalize computes an exact histogram step, where Pillow rounds the step to whole pixels.

timm interpolates each geometric operation bilinearly or bicubically, chosen at random; here it is
always bilinear.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resnet_dist.data import dali_operations
from resnet_dist.data.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class StrengthRange:
    """The largest strength of an operation in a policy."""

    largest: float = 0.0
    """in the unit of the operation's parameter, or as a fraction of the image side"""
    of_side: bool = False
    """whether `largest` is a fraction of the image side"""

    def in_pixels(self, side: int) -> float:
        """The largest strength for square images.

        Args:
            side: side of the images, in pixels.

        Returns:
            `largest` times `side` if the range is a fraction of the side, otherwise `largest`.
        """
        if self.of_side:
            return self.largest * side
        return self.largest


# A law computes the parameters of one operation. Its arguments are
#   level: [m], the strength as a fraction of the largest strength, from 0 to 1,
#   sign: [m], -1 or 1,
#   largest: the largest strength.
# It returns the parameters, [m].
Law = Callable[[FloatArray, IntArray, float], FloatArray]


def _zero(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The parameter of an operation that has none: 0."""
    return np.zeros_like(level)


def _signed(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The tangent of a shear angle, or a rotation in degrees."""
    return largest * level * sign


def _whole_pixels(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """A translation, in whole pixels."""
    pixels = _signed(level, sign, largest)
    return np.trunc(pixels)


def _factor(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The factor of brightness, color, contrast or sharpness; 1 leaves the image unchanged."""
    change = _signed(level, sign, largest)
    return 1 + change


def _bits(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The number of bits per channel that posterize keeps."""
    num_removed = np.rint(level * largest)
    bits: FloatArray = 8 - num_removed
    return bits


def _threshold(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The value, from 0 to 255, at and above which solarize inverts."""
    return 255 * (1 - level)


def _bits_of_timm(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The number of bits per channel that posterize keeps: `largest` down to 0."""
    bits: FloatArray = largest - np.trunc(level * largest)
    return bits


def _threshold_of_timm(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The value at and above which solarize inverts: `largest` down to 0."""
    threshold: FloatArray = largest - np.trunc(level * largest)
    return threshold


def _addend(level: FloatArray, sign: IntArray, largest: float) -> FloatArray:
    """The number that solarize_add adds to dark values."""
    addend: FloatArray = np.trunc(level * largest)
    return addend


# A function of this type turns parameters [m] into matrices [m, 3, 3] for images of the given side
# in pixels.
#   Geometric operations: the matrix maps (x, y, 1) in the result, in pixels from the top left
#   corner, to the position in the input image.
#   Sharpness: the matrix is a 3 x 3 filter.
#   All others: the parameter is at [0, 0], and the rest is 0.
MatrixOf = Callable[[FloatArray, int], FloatArray]


def _corner(params: FloatArray, side: int) -> FloatArray:
    """Matrices that hold the parameter at [0, 0]."""
    matrices = np.zeros((len(params), 3, 3))
    matrices[:, 0, 0] = params
    return matrices


def _identity_matrices(count: int) -> FloatArray:
    """`count` identity matrices: [count, 3, 3]."""
    identity = np.eye(3)
    return np.tile(identity, (count, 1, 1))


def _shear_x(params: FloatArray, side: int) -> FloatArray:
    """Horizontal shear: x + parameter * y."""
    matrices = _identity_matrices(len(params))
    matrices[:, 0, 1] = params
    return matrices


def _shear_y(params: FloatArray, side: int) -> FloatArray:
    """Vertical shear: y + parameter * x."""
    matrices = _identity_matrices(len(params))
    matrices[:, 1, 0] = params
    return matrices


def _translate_x(params: FloatArray, side: int) -> FloatArray:
    """Move the image to the right by the parameter."""
    matrices = _identity_matrices(len(params))
    matrices[:, 0, 2] = -params
    return matrices


def _translate_y(params: FloatArray, side: int) -> FloatArray:
    """Move the image down by the parameter."""
    matrices = _identity_matrices(len(params))
    matrices[:, 1, 2] = -params
    return matrices


def _rotate(params: FloatArray, side: int) -> FloatArray:
    """Counter-clockwise rotation around the centre of the image, by the parameter in degrees."""
    angle = np.deg2rad(params)
    cos = np.cos(angle)
    sin = np.sin(angle)

    # With these offsets, the centre of the image is mapped to itself.
    center = side / 2
    offset_x = center * (1 - cos + sin)
    offset_y = center * (1 - cos - sin)

    matrices = _identity_matrices(len(params))
    matrices[:, 0, 0] = cos
    matrices[:, 0, 1] = -sin
    matrices[:, 0, 2] = offset_x
    matrices[:, 1, 0] = sin
    matrices[:, 1, 1] = cos
    matrices[:, 1, 2] = offset_y
    return matrices


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
"""Pillow's filter SMOOTH, which sharpness blends with the image."""
_UNCHANGED = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
"""The filter that returns the image unchanged."""


def _sharpness_filter(params: FloatArray, side: int) -> FloatArray:
    """Blend the smoothed image (parameter 0) with the image itself (parameter 1)."""
    factors = params[:, None, None]
    return _SMOOTH + factors * (_UNCHANGED - _SMOOTH)


@dataclass(frozen=True)
class Operation:
    """One operation on the pixels of an image."""

    name: str
    dali_form: dali_operations.DaliForm
    """adds the operation to a DALI graph"""
    law: Law = _zero
    """computes the parameter from the strength"""
    matrix_of: MatrixOf = _corner
    """computes the matrix that is passed to DALI from the parameter"""
    ranges: Mapping[str, StrengthRange] = field(default_factory=dict)
    """the largest strength in each policy that draws the operation, by the policy's name"""


def _ranges(usual: StrengthRange, wide: StrengthRange) -> dict[str, StrengthRange]:
    """The ranges of an operation that all three policies draw.

    Args:
        usual: range of RandAugment and AutoAugment.
        wide: range of TrivialAugmentWide.
    """
    return {
        "randaugment": usual,
        "autoaugment": usual,
        "trivialaugment": wide,
    }


_NO_RANGE = _ranges(StrengthRange(), StrengthRange())
_SHEAR = _ranges(StrengthRange(0.3), StrengthRange(0.99))
_TRANSLATION = _ranges(StrengthRange(150 / 331, of_side=True), StrengthRange(32))
_ROTATION = _ranges(StrengthRange(30), StrengthRange(135))
_FACTOR = _ranges(StrengthRange(0.9), StrengthRange(0.99))
_FACTOR["randaugment_increasing"] = StrengthRange(0.9)
_NO_RANGE_ALSO_IN_TIMM = {**_NO_RANGE, "randaugment_increasing": StrengthRange()}
_POSTERIZE = _ranges(StrengthRange(4), StrengthRange(6))

# A policy draws an operation by its position among the operations that have a range in it. The
# order is torchvision's. It must not change, since a resumed run would draw other operations. Add
# new operations at the end.
_TABLE = (
    Operation(
        name="identity",
        dali_form=dali_operations.dali_identity,
        ranges=_NO_RANGE,
    ),
    Operation(
        name="shear_x",
        dali_form=dali_operations.dali_warp,
        law=_signed,
        matrix_of=_shear_x,
        ranges=_SHEAR,
    ),
    Operation(
        name="shear_y",
        dali_form=dali_operations.dali_warp,
        law=_signed,
        matrix_of=_shear_y,
        ranges=_SHEAR,
    ),
    Operation(
        name="translate_x",
        dali_form=dali_operations.dali_warp,
        law=_whole_pixels,
        matrix_of=_translate_x,
        ranges=_TRANSLATION,
    ),
    Operation(
        name="translate_y",
        dali_form=dali_operations.dali_warp,
        law=_whole_pixels,
        matrix_of=_translate_y,
        ranges=_TRANSLATION,
    ),
    Operation(
        name="rotate",
        dali_form=dali_operations.dali_warp,
        law=_signed,
        matrix_of=_rotate,
        ranges=_ROTATION,
    ),
    Operation(
        name="brightness",
        dali_form=dali_operations.dali_brightness,
        law=_factor,
        ranges=_FACTOR,
    ),
    Operation(
        name="color",
        dali_form=dali_operations.dali_color,
        law=_factor,
        ranges=_FACTOR,
    ),
    Operation(
        name="contrast",
        dali_form=dali_operations.dali_contrast,
        law=_factor,
        ranges=_FACTOR,
    ),
    Operation(
        name="sharpness",
        dali_form=dali_operations.dali_sharpness,
        law=_factor,
        matrix_of=_sharpness_filter,
        ranges=_FACTOR,
    ),
    Operation(
        name="posterize",
        dali_form=dali_operations.dali_posterize,
        law=_bits,
        ranges=_POSTERIZE,
    ),
    Operation(
        name="solarize",
        dali_form=dali_operations.dali_solarize,
        law=_threshold,
        ranges=_NO_RANGE,
    ),
    Operation(
        name="autocontrast",
        dali_form=dali_operations.dali_autocontrast,
        ranges=_NO_RANGE_ALSO_IN_TIMM,
    ),
    Operation(
        name="equalize",
        dali_form=dali_operations.dali_equalize,
        ranges=_NO_RANGE_ALSO_IN_TIMM,
    ),
    Operation(
        name="invert",
        dali_form=dali_operations.dali_invert,
        ranges={
            "autoaugment": StrengthRange(),
            "randaugment_increasing": StrengthRange(),
        },
    ),
    # Only the colour jitter draws hue. Its parameter is in turns of the colour circle.
    Operation(
        name="hue",
        dali_form=dali_operations.dali_hue,
    ),
    # The operations of timm's RandAugment that differ from torchvision's of the same name.
    Operation(
        name="timm_shear_x",
        dali_form=dali_operations.dali_warp_on_mean,
        law=_signed,
        matrix_of=_shear_x,
        ranges={"randaugment_increasing": StrengthRange(0.3)},
    ),
    Operation(
        name="timm_shear_y",
        dali_form=dali_operations.dali_warp_on_mean,
        law=_signed,
        matrix_of=_shear_y,
        ranges={"randaugment_increasing": StrengthRange(0.3)},
    ),
    Operation(
        name="timm_translate_x",
        dali_form=dali_operations.dali_warp_on_mean,
        law=_signed,
        matrix_of=_translate_x,
        ranges={"randaugment_increasing": StrengthRange(0.45, of_side=True)},
    ),
    Operation(
        name="timm_translate_y",
        dali_form=dali_operations.dali_warp_on_mean,
        law=_signed,
        matrix_of=_translate_y,
        ranges={"randaugment_increasing": StrengthRange(0.45, of_side=True)},
    ),
    Operation(
        name="timm_rotate",
        dali_form=dali_operations.dali_warp_on_mean,
        law=_signed,
        matrix_of=_rotate,
        ranges={"randaugment_increasing": StrengthRange(30)},
    ),
    Operation(
        name="timm_posterize",
        dali_form=dali_operations.dali_posterize,
        law=_bits_of_timm,
        ranges={"randaugment_increasing": StrengthRange(4)},
    ),
    Operation(
        name="timm_solarize",
        dali_form=dali_operations.dali_solarize,
        law=_threshold_of_timm,
        ranges={"randaugment_increasing": StrengthRange(256)},
    ),
    Operation(
        name="solarize_add",
        dali_form=dali_operations.dali_solarize_add,
        law=_addend,
        ranges={"randaugment_increasing": StrengthRange(110)},
    ),
)

OPERATIONS = {operation.name: operation for operation in _TABLE}
"""The operations by name."""

NAMES = tuple(OPERATIONS)
"""The names of the operations. The id of an operation is its position in this tuple."""

DALI_FORMS = tuple(dict.fromkeys(operation.dali_form for operation in _TABLE))
"""The different DALI forms. Each is one branch of the DALI graph."""

BRANCH_OF_OP = np.array([DALI_FORMS.index(operation.dali_form) for operation in _TABLE], np.int32)
"""int32 [number of operations]: position in `DALI_FORMS` of the form of each operation id."""


def operation_ids(names: Iterable[str]) -> IntArray:
    """The ids of operations.

    Args:
        names: n names out of `NAMES`.

    Returns:
        int64 [n].

    Raises:
        KeyError: for a name that is not in the table.
    """
    ids = {name: number for number, name in enumerate(NAMES)}
    return np.array([ids[name] for name in names], np.int64)


def drawn_by(policy: str) -> IntArray:
    """The ids of the operations that a policy draws from, in the policy's order.

    Args:
        policy: one of `augment.policy`.

    Returns:
        int64, one-dimensional.
    """
    names = []
    for name, operation in OPERATIONS.items():
        if policy in operation.ranges:
            names.append(name)
    return operation_ids(names)


def parameters(
    policy: str,
    ops: IntArray,
    levels: FloatArray,
    signs: IntArray,
    side: int,
) -> FloatArray:
    """The parameters of operations that a policy has drawn.

    Args:
        policy: one of `augment.policy`.
        ops: int64 [n, K], operation ids.
        levels: float64 [n, K], the strength as a fraction of the largest, from 0 to 1.
        signs: [n, K], -1 or 1.
        side: side of the square images, in pixels.

    Returns:
        float64 [n, K], each in the unit of its operation.
    """
    params = np.zeros(ops.shape)
    for operation, is_chosen in _by_operation(ops):
        # The identity stands for an operation that was drawn and is not applied. It needs no range.
        strength_range = operation.ranges.get(policy, StrengthRange())
        largest = strength_range.in_pixels(side)
        params[is_chosen] = operation.law(levels[is_chosen], signs[is_chosen], largest)
    return params


def matrices(ops: IntArray, params: FloatArray, side: int) -> FloatArray:
    """The matrices that are passed to DALI for operations with the given parameters.

    As in torchvision, a shear keeps the corner of the image fixed and a rotation the centre.

    Args:
        ops: int64 [n, K], operation ids.
        params: float64 [n, K], each in the unit of its operation.
        side: side of the square images, in pixels.

    Returns:
        float32 [n, K, 3, 3].
    """
    found = np.zeros((*ops.shape, 3, 3), np.float32)
    for operation, is_chosen in _by_operation(ops):
        found[is_chosen] = operation.matrix_of(params[is_chosen], side)
    return found


def _by_operation(ops: IntArray) -> Iterable[tuple[Operation, np.ndarray[Any, Any]]]:
    """Group operation ids by operation.

    Yields:
        Each operation that occurs in `ops`, with a boolean mask of the shape of `ops` that is True
        where it occurs.
    """
    counts = np.bincount(ops.ravel(), minlength=len(NAMES))
    for number in np.flatnonzero(counts):
        name = NAMES[number]
        yield OPERATIONS[name], ops == number
