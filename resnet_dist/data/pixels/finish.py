"""From decoded windows to what the model is fed: resize, square, mirror, normalise, erase.

On the CPU, image by image while it is in the cache, in the threads of the loader. In training with
torch's uint8 kernel, which takes a fraction of the time of DALI's resize there and is nearer to
Pillow; in evaluation with Pillow itself, so that a model is shown exactly the pixels that it would
get from torchvision. On a GPU, DALI has done the first half and a few kernels do the rest for the
whole batch.
"""

import contextlib
import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from resnet_dist.config import DataConfig


def compute_alone() -> None:
    """Let torch's operations in the calling thread start no team of OpenMP's threads beside the
    training's.

    The teams cost 0.1 ms of processor time an image. torch.set_num_threads would hold for all
    threads.
    """
    torch.get_num_threads()  # torch sets the number once itself, in each thread
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).omp_set_num_threads(1)


def resize_fast(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [h, w, 3] resized to `size`, with antialias: Pillow's arithmetic in 16 bits,
    vectorised.

    On photographs 0.4 ms an image where Pillow takes 1.7; 0.2 % of the values differ from Pillow's
    by 1, one in seven million by 2.
    """
    planes = pixels[None].permute(0, 3, 1, 2)  # channels_last, which is what the fast kernel wants
    return functional.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(
        1, 2, 0
    )


def resize_exact(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As `resize_fast`, by Pillow itself: the very values of torchvision's Resize on PIL images."""
    resized = Image.fromarray(pixels.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


def cut(
    pixels: torch.Tensor,
    size: tuple[int, int],
    offset: Sequence[int],
    flip: int,
    side: int,
    resize: Callable = resize_fast,
) -> torch.Tensor:
    """Resize one decoded window, take the square out of it and mirror it: uint8 [h, w, 3] to [side,
    side, 3].

    The CPU's counterpart of the graph's second half. What lies outside of the window is black.
    """
    if size != tuple(pixels.shape[:2]):
        pixels = resize(pixels, size)
    if size != (side, side) or any(offset):
        (top, left), (y, x) = (
            [max(-place, 0) for place in offset],
            [max(place, 0) for place in offset],
        )
        inside = pixels[y : offset[0] + side, x : offset[1] + side]
        if inside.shape[:2] == (side, side):
            pixels = inside
        else:
            pixels = pixels.new_zeros(side, side, 3)
            pixels[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return pixels[None].permute(0, 3, 1, 2).flip(3)[0].permute(1, 2, 0) if flip else pixels


class Normalizer:
    """Pixels to what the model is fed: (pixel / 255 - mean) / std per channel, in the training
    precision.
    """

    def __init__(self, config: DataConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.mean, self.std = (
            torch.tensor(value, dtype=torch.float64) for value in (config.mean, config.std)
        )
        self.dtype, self.device = dtype, device
        self.factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, width: int) -> None:
        """Lay the factors out for a row of `width` pixels, so that the inner loop has 3 * width
        elements instead of 3 and can be vectorised: 0.06 ms an image of 224 pixels on the CPU
        instead of 0.9.
        """
        if width not in self.factors:
            self.factors[width] = tuple(
                row.repeat(width).to(self.device, torch.float32)
                for row in (1 / (255 * self.std), -self.mean / self.std)
            )

    def __call__(
        self, pixels: torch.Tensor, out: torch.Tensor, light: np.ndarray | None = None
    ) -> None:
        """Fill `out` [n, H, W, 3] of the training precision, contiguous, from `pixels` uint8 [n, H,
        W, 3].

        `light` [n, 3] is added to the pixels in [0, 1] before (PCA lighting). `prepare` comes
        before.
        """
        width = pixels.shape[-2]
        scale, shift = self.factors[width]
        pixels, out = pixels.flatten(-2), out.flatten(-2)  # rows of all channels; of `out` no copy
        if light is not None:
            added = (torch.from_numpy(light).double() / self.std).repeat(1, width).to(shift)
            shift = shift + added[:, None]
        torch.addcmul(shift, pixels.float(), scale, out=out)


def erase(images: torch.Tensor, boxes: np.ndarray) -> None:
    """Set the rectangles `boxes` (y, x, height, width), int64 [n, 4], of `images` [n, H, W, 3] to
    zero, in place.
    """
    for number in np.flatnonzero(boxes[:, 2]):
        y, x, height, width = boxes[number].tolist()
        images[number, y : y + height, x : x + width] = 0
