"""The DALI form of each operation of the augmentation.

A DALI form is a function that adds one operation to a DALI graph. `operations.py` says which
operation has which form.
"""

from collections.abc import Callable
from typing import Any

DaliNode = Any
"""A node of a DALI graph that is being defined."""

# A DALI form adds one operation to the graph. Its arguments are
#   pixels: uint8 [H, W, 3],
#   matrix: float32 [3, 3], the matrix of the operation, in host memory,
#   on_gpu: whether the pixels are in GPU memory.
# It returns the node of the changed pixels, of the same type and shape.
DaliForm = Callable[[DaliNode, DaliNode, bool], DaliNode]

_MEAN_COLOR = [124.0, 116.0, 104.0]
"""Mean of ImageNet's R, G and B, rounded as in timm: 255 * (0.485, 0.456, 0.406)."""

# Pillow and torchvision truncate to an integer, and DALI rounds to the nearest one. Subtracting
# nearly half a level before rounding gives the truncated value.
_TRUNCATE = -0.49


def _beside_pixels(matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """The matrix in the memory of the pixels, for an expression that uses both."""
    if on_gpu:
        return matrix.gpu()
    return matrix


def _to_uint8(values: DaliNode) -> DaliNode:
    """Convert to uint8; values are rounded and clipped to 0 to 255."""
    from nvidia.dali import fn, types

    return fn.cast(values, dtype=types.UINT8)


def _to_gray(pixels: DaliNode) -> DaliNode:
    """The luminance of RGB pixels: uint8 [H, W, 1]."""
    from nvidia.dali import fn, types

    return fn.color_space_conversion(
        pixels,
        image_type=types.RGB,
        output_type=types.GRAY,
    )


def _white() -> DaliNode:
    """The uint8 constant 255. XOR with it inverts a pixel."""
    from nvidia.dali import types

    return types.Constant(255, dtype=types.UINT8)


def _blend(pixels: DaliNode, other: DaliNode, factor: DaliNode) -> DaliNode:
    """Compute factor * pixels + (1 - factor) * other.

    The two terms are 16-bit integers, so that neither of them is clipped before the addition.

    Args:
        pixels: uint8 [H, W, 3].
        other: uint8, of the same shape or one that is broadcast to it.
        factor: a scalar; 0 gives `other`, 1 gives `pixels`, and above 1 extrapolates.

    Returns:
        uint8 [H, W, 3].
    """
    from nvidia.dali import fn, types

    first_term = fn.brightness(
        pixels,
        brightness=factor,
        dtype=types.INT16,
    )
    second_term = fn.brightness(
        other,
        brightness=1 - factor,
        # DALI takes the shift as a fraction of the largest value of the output type.
        brightness_shift=_TRUNCATE / 32767,
        dtype=types.INT16,
    )
    return _to_uint8(first_term + second_term)


def dali_identity(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Return the pixels unchanged."""
    return pixels


def dali_warp(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Apply any of the geometric operations. Pixels from outside of the image are black."""
    return _warp(pixels, matrix, on_gpu, [0.0])


def dali_warp_on_mean(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Apply any of the geometric operations. Pixels from outside have ImageNet's mean colour."""
    return _warp(pixels, matrix, on_gpu, _MEAN_COLOR)


def _warp(pixels: DaliNode, matrix: DaliNode, on_gpu: bool, fill: list[float]) -> DaliNode:
    """Apply a geometric operation, with bilinear interpolation.

    Args:
        pixels: uint8 [H, W, 3].
        matrix: the matrix of the operation.
        on_gpu: whether the pixels are in GPU memory.
        fill: color of the pixels from outside of the image: one number, or one for each channel.
    """
    from nvidia.dali import fn

    if on_gpu:
        return _warp_on_gpu(pixels, matrix, fill)
    # On a CPU, warp_perspective uses OpenCV and takes 0.3 ms for an image of 224 x 224 pixels,
    # where warp_affine takes 2.6 ms.
    return fn.experimental.warp_perspective(
        pixels,
        matrix=matrix,
        fill_value=fill,
    )


def _warp_on_gpu(pixels: DaliNode, matrix: DaliNode, fill: list[float]) -> DaliNode:
    """`_warp` on a GPU, where `warp_affine` fills with one number for all channels."""
    from nvidia.dali import fn

    # An affine matrix is without the last row, which is (0, 0, 1).
    affine = matrix[:2]
    if len(fill) == 1:
        return fn.warp_affine(pixels, matrix=affine, fill_value=fill[0])
    warped = []
    for number, value in enumerate(fill):
        channel = pixels[:, :, number : number + 1]
        warped.append(fn.warp_affine(channel, matrix=affine, fill_value=value))
    return fn.cat(*warped, axis=2)


def dali_brightness(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Multiply the pixels by the factor.

    A factor of 0 gives a black image.
    """
    from nvidia.dali import fn

    factor = matrix[0, 0]
    return fn.brightness(
        pixels,
        brightness=factor,
        brightness_shift=_TRUNCATE / 255,
    )


def dali_color(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Blend the image with its grayscale version.

    A factor of 0 gives the grayscale image.
    """
    from nvidia.dali import fn, types

    factor = matrix[0, 0]
    gray = fn.color_space_conversion(
        _to_gray(pixels),
        image_type=types.GRAY,
        output_type=types.RGB,
    )
    return _blend(pixels, gray, factor)


def dali_contrast(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Blend the image with the mean of its grayscale version.

    A factor of 0 gives an image of a single gray.
    """
    from nvidia.dali import fn

    factor = matrix[0, 0]
    gray = _to_gray(pixels)
    mean = fn.reductions.mean(gray, keep_dims=True)
    return _blend(pixels, mean, factor)


def dali_sharpness(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Apply the 3 x 3 filter of `operations.py` for sharpness."""
    from nvidia.dali import fn

    kernel = _beside_pixels(matrix, on_gpu)
    return fn.filter(pixels, kernel)


def dali_posterize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Set the lower bits of each channel to zero.

    The mask has ones for the upper bits that are kept, for instance 0b11110000 for 4 bits.
    """
    from nvidia.dali import math

    num_kept = _beside_pixels(matrix, on_gpu)[0, 0]
    num_removed = 8 - num_kept
    bit_mask = 256 - math.pow(2.0, num_removed)
    return pixels & _to_uint8(bit_mask)


def dali_solarize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Invert the values at and above the threshold."""
    threshold = _beside_pixels(matrix, on_gpu)[0, 0]
    is_inverted = pixels >= threshold
    return pixels ^ (is_inverted * _white())


def dali_solarize_add(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Add the parameter to the values below 128; the sum is at most 255."""
    addend = _beside_pixels(matrix, on_gpu)[0, 0]
    is_dark = pixels < 128
    return _to_uint8(pixels + is_dark * addend)


def dali_autocontrast(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Stretch each channel linearly to the range 0 to 255."""
    from nvidia.dali import fn

    low = fn.reductions.min(pixels, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(pixels, axis_names="HW", keep_dims=True)

    # A channel with a single value stays unchanged: it is shifted by 0 and scaled by 255 / 255.
    is_flat = high == low
    shift = low * (high > low)
    span = high - low + is_flat * _white()
    scale = 255 / span
    return _to_uint8((pixels - shift) * scale)


def dali_equalize(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Equalize the histogram of each channel.

    DALI uses the formula of OpenCV. On the inverted image it gives Pillow's result.
    """
    from nvidia.dali import fn

    white = _white()
    inverted = pixels ^ white
    equalized = fn.equalize(inverted)
    return equalized ^ white


def dali_invert(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Invert all values."""
    return pixels ^ _white()


def dali_hue(pixels: DaliNode, matrix: DaliNode, on_gpu: bool) -> DaliNode:
    """Rotate the hue in HSV space; the parameter is in turns of the colour circle.

    The hue is a position from 0 to 6 on a circle: red is at 0, green at 2 and blue at 4. It lies
    within 1 of the position of the largest channel. Value and saturation do not change, so the
    largest and the smallest channel keep their values, whichever channels these are afterwards.
    """
    from nvidia.dali import fn, math

    turns = _beside_pixels(matrix, on_gpu)[0, 0]
    # The factor 1.0 converts to float.
    red = pixels[:, :, 0:1] * 1.0
    green = pixels[:, :, 1:2] * 1.0
    blue = pixels[:, :, 2:3] * 1.0
    high = math.max(red, math.max(green, blue))
    low = math.min(red, math.min(green, blue))
    span = high - low

    # Exactly one of these is 1 for each pixel: of equal channels, the first one counts.
    is_red = red == high
    is_green = (green == high) & (red != high)
    is_blue = is_red == is_green

    # The distance of the hue from the position of the largest channel, times `span`.
    distance = is_red * (green - blue)
    distance = distance + is_green * (blue - red)
    distance = distance + is_blue * (red - green)

    hue = distance / math.max(span, 1.0)
    hue = hue + is_green * 2
    hue = hue + is_blue * 4
    hue = hue + turns * 6
    hue = hue - math.floor(hue / 6) * 6

    # How much of `span` is added to the lowest value, for the new red, green and blue.
    red_share = math.fabs(hue - 3) - 1
    green_share = 2 - math.fabs(hue - 2)
    blue_share = 2 - math.fabs(hue - 4)
    channels = []
    for share in (red_share, green_share, blue_share):
        clamped = math.clamp(share, 0.0, 1.0)
        channels.append(high - span + span * clamped)
    return _to_uint8(fn.cat(*channels, axis=2))
