"""From decoded windows to the input of the model: resize, crop, mirror, normalise, erase.

On the CPU, the threads of the loader process one image at a time, while it is in the cache.
Training resizes with the uint8 kernel of torch, which is much faster than DALI's CPU resize and
closer to Pillow. Evaluation resizes with Pillow itself, so that the pixels are exactly those of
torchvision's transforms on PIL images. On a GPU, DALI has already resized, cropped and mirrored the
images. A few kernels then normalise and erase the whole batch.
"""

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import FloatArray, IntArray

# Resizes pixels, uint8 [h, w, 3], to (height, width).
Resize = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]


def disable_openmp_in_thread() -> None:
    """Run torch operations of the calling thread in this thread only.

    Otherwise each thread of the loader starts its own team of OpenMP threads, which costs 0.1 ms of
    CPU time per image. `torch.set_num_threads` would also change the number of threads of training.
    """
    # torch sets the number of OpenMP threads when a thread first asks for it. This call makes sure
    # that it does not happen later, which would undo the setting.
    torch.get_num_threads()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).omp_set_num_threads(1)


def resize_fast(
    pixels: torch.Tensor, size: tuple[int, int], mode: str = "bilinear"
) -> torch.Tensor:
    """Resize with torch's vectorised kernel with antialiasing.

    Its arithmetic is Pillow's in 16 bits. On photographs it takes 0.4 ms per image, where Pillow
    takes 1.7 ms. 0.3 % of the values differ from Pillow's by 1, and with the bicubic filter one in
    a million by 2. Both resize the rows first; Pillow 13 begins with the columns of some images,
    and then more values differ (docs/data.md).

    Args:
        pixels: uint8 [h, w, 3].
        size: (height, width) of the result.
        mode: The filter, "bilinear" or "bicubic".

    Returns:
        uint8 [height, width, 3].
    """
    # The fast kernel needs the memory format channels_last, [1, 3, h, w].
    batch = pixels[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(
        batch,
        size=size,
        mode=mode,
        antialias=True,
    )
    return resized[0].permute(1, 2, 0)


def resize_exact(
    pixels: torch.Tensor,
    size: tuple[int, int],
    method: Image.Resampling = Image.Resampling.BILINEAR,
) -> torch.Tensor:
    """Resize with Pillow: the result equals torchvision's Resize on PIL images.

    Args:
        pixels: uint8 [h, w, 3].
        size: (height, width) of the result.
        method: The filter.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = size
    image = Image.fromarray(pixels.numpy())
    resized = image.resize((width, height), method)
    return torch.from_numpy(np.array(resized))


FAST_RESIZES: dict[str, Resize] = {
    "bilinear": resize_fast,
    "bicubic": partial(resize_fast, mode="bicubic"),
}
"""The function that resizes in training on the CPU, by the name of the filter."""

EXACT_RESIZES: dict[str, Resize] = {
    "bilinear": resize_exact,
    "bicubic": partial(resize_exact, method=Image.Resampling.BICUBIC),
}
"""The function that resizes in evaluation, by the name of the filter."""


def resize_and_crop(
    pixels: torch.Tensor,
    size: tuple[int, int],
    offset: Sequence[int],
    flip: int,
    side: int,
    resize: Resize = resize_fast,
) -> torch.Tensor:
    """Resize a decoded window, cut a square out of it and mirror the square.

    On a GPU, the second half of DALI's graph does the same.

    Args:
        pixels: uint8 [h, w, 3], the window.
        size: (height, width) to resize to.
        offset: (y, x) of the square in the resized window. Parts of the square outside of the
            window are black.
        flip: 1 to mirror the square horizontally, otherwise 0.
        side: side of the square, in pixels.
        resize: the function that resizes: `resize_fast` or `resize_exact`.

    Returns:
        uint8 [side, side, 3].
    """
    if size != tuple(pixels.shape[:2]):
        pixels = resize(pixels, size)
    if size != (side, side) or any(offset):
        pixels = _crop_square(pixels, offset, side)
    if not flip:
        return pixels
    # torch.flip is fast on the memory format channels_last, [1, 3, side, side].
    batch = pixels[None].permute(0, 3, 1, 2)
    mirrored = batch.flip(3)
    return mirrored[0].permute(1, 2, 0)


def _crop_square(pixels: torch.Tensor, offset: Sequence[int], side: int) -> torch.Tensor:
    """Cut a square out of an image. Parts of the square outside of the image are black.

    Args:
        pixels: uint8 [h, w, 3].
        offset: (y, x) of the square; both may be negative.
        side: side of the square.

    Returns:
        uint8 [side, side, 3]; a view of `pixels` if the whole square lies in the image.
    """
    y, x = offset
    first_row = max(y, 0)
    first_column = max(x, 0)
    # With more padding than its side, a square may lie outside as a whole.
    end_row = max(y + side, 0)
    end_column = max(x + side, 0)
    inside = pixels[first_row:end_row, first_column:end_column]
    height, width = inside.shape[:2]
    if (height, width) == (side, side):
        return inside

    top = max(-y, 0)
    left = max(-x, 0)
    square = pixels.new_zeros(side, side, 3)
    square[top : top + height, left : left + width] = inside
    return square


class Normalizer:
    """Converts uint8 pixels to the input of the model: (pixel / 255 - mean) / std per channel.

    Args:
        config: the section `data`, with `mean` and `std` of pixels in [0, 1].
        dtype: type of the model's input.
        device: device of the pixels and of the result.
    """

    def __init__(self, config: DataConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.mean = torch.tensor(config.mean, dtype=torch.float64)
        self.std = torch.tensor(config.std, dtype=torch.float64)
        self.dtype = dtype
        self.device = device
        # By the width of the images: scale and shift of a row of pixels, float32 [3 * width] each.
        self.factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, width: int) -> None:
        """Compute the factors for images of a width. Call it before the first image of that width.

        The factors are repeated for all pixels of a row. The inner loop then has 3 * width elements
        instead of 3 and is vectorised: on a CPU, an image of 224 x 224 pixels takes 0.06 ms instead
        of 0.9 ms.

        Args:
            width: width of the images, in pixels.
        """
        if width in self.factors:
            return
        scale = 1 / (255 * self.std)
        shift = -self.mean / self.std
        self.factors[width] = (
            self._repeat(scale, width),
            self._repeat(shift, width),
        )

    def _repeat(self, of_channels: torch.Tensor, width: int) -> torch.Tensor:
        """Repeat the values of the channels [3] for a row of pixels: float32 [3 * width]."""
        of_row = of_channels.repeat(width)
        return of_row.to(self.device, torch.float32)

    def __call__(
        self,
        pixels: torch.Tensor,
        out: torch.Tensor,
        lighting: FloatArray | None = None,
    ) -> None:
        """Write the normalised pixels to `out`.

        Args:
            pixels: uint8 [n, H, W, 3].
            out: [n, H, W, 3] of the training precision, contiguous.
            lighting: float32 [n, 3], what PCA lighting adds to R, G and B of pixels in [0, 1];
                None for no lighting.
        """
        width = pixels.shape[-2]
        scale, shift = self.factors[width]
        if lighting is not None:
            added = torch.from_numpy(lighting).double() / self.std
            added_to_row = added.repeat(1, width).to(shift.dtype)
            shift = shift + to_device(added_to_row, self.device)[:, None]

        rows = pixels.flatten(-2)
        torch.addcmul(
            shift,
            rows.float(),
            scale,
            out=out.flatten(-2),
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device.

    A copy to a GPU starts from pinned memory, and this function does not wait until it is finished.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def erase(images: torch.Tensor, boxes: IntArray) -> None:
    """Set one rectangle of each image to zero, in place.

    Args:
        images: [n, H, W, 3].
        boxes: int64 [n, 4], (y, x, height, width); all zeros for an image that is not erased.
    """
    if images.device.type != "cpu":
        boxes_on_device = to_device(torch.from_numpy(boxes), images.device)
        erase_by_mask(images, boxes_on_device)
        return
    # On the CPU, only the pixels of the rectangles are written.
    for number in np.flatnonzero(boxes[:, 2]):
        y, x, height, width = boxes[number].tolist()
        images[number, y : y + height, x : x + width] = 0


def erase_by_mask(images: torch.Tensor, boxes: torch.Tensor) -> None:
    """Like `erase`, but with a few kernels for the whole batch and no transfer to the host.

    Args:
        images: [n, H, W, 3].
        boxes: int64 [n, 4], (y, x, height, width), on the device of the images.
    """
    # [n, 1] each
    y, x, height, width = boxes[:, :, None].unbind(1)

    rows = torch.arange(images.shape[1], device=images.device)
    columns = torch.arange(images.shape[2], device=images.device)
    # [n, H] and [n, W]
    is_row_erased = (rows >= y) & (rows < y + height)
    is_column_erased = (columns >= x) & (columns < x + width)

    is_erased = is_row_erased[:, :, None] & is_column_erased[:, None, :]
    images.masked_fill_(is_erased[..., None], 0)
