"""The file of the training cache, which all ranks of a machine write and map.

First come the sizes of all images, int32 (height, width) each. Then come the images, one behind the
other between two margins, as `DecodedImages.pixels` has them.
"""

import mmap
import os

import numpy as np
import torch

from resnet_dist.data.pixels.decoded_images import CHANNELS, MARGIN, DecodedImages
from resnet_dist.files import write_at

# Height and width of an image, int32 each.
_SIZE_BYTES = 8


class CacheFile:
    """The cache file of a split.

    It is filled in this order: `open` on every rank, `write_sizes` for all images, `lay_out` on
    every rank, `reserve` on one of them, `write_image` or `mark_as_bad` for all images. Each method
    raises OSError if the disk fails.
    """

    def __init__(self, num_images: int) -> None:
        """Begin without a file.

        Args:
            num_images: Number of images of the split.
        """
        self.num_images = num_images
        # These are known after `lay_out`.
        self.sizes = np.zeros((num_images, 2), np.int64)
        """int64 [N, 2]: height and width of each image"""
        self.starts = np.zeros(num_images, np.int64)
        """int64 [N]: the position of each image in the file"""
        self.image_bytes = 0
        """bytes of all images together"""
        self._opened: int | None = None

    def open(self, path: str, *, is_new: bool) -> None:
        """Open the file for reading and writing.

        Args:
            path: The file.
            is_new: Whether to create it; it must not exist then.
        """
        flags = os.O_RDWR | os.O_CLOEXEC
        if is_new:
            flags |= os.O_CREAT | os.O_EXCL
        # Nobody but the user may read it.
        self._opened = os.open(path, flags, 0o600)

    def close(self) -> None:
        """Let the file go; what is mapped stays."""
        if self._opened is not None:
            os.close(self._opened)

    def write_sizes(self, first_row: int, sizes: np.ndarray) -> None:
        """Write the sizes of consecutive images.

        Args:
            first_row: The row of the first of them.
            sizes: int32 [n, 2], (height, width) of each.
        """
        content = sizes.tobytes()
        position = first_row * _SIZE_BYTES
        write_at(self._descriptor, content, position)

    def lay_out(self) -> None:
        """Read the sizes of all images, and find the place of each."""
        stored = os.pread(self._descriptor, self._pixels_start, 0)
        flat = np.frombuffer(stored, np.int32)
        self.sizes = flat.reshape(-1, 2).astype(np.int64)
        num_pixels = self.sizes.prod(axis=1)
        lengths = CHANNELS * num_pixels
        ends = np.cumsum(lengths)
        first_start = self._pixels_start + MARGIN
        self.starts = first_start + ends - lengths
        self.image_bytes = int(ends[-1])

    @property
    def num_bytes(self) -> int:
        """The size of the whole file, after `lay_out`."""
        margins = 2 * MARGIN
        return self._pixels_start + margins + self.image_bytes

    def reserve(self) -> None:
        """Take the disk space of the whole file."""
        os.posix_fallocate(self._descriptor, 0, self.num_bytes)

    def write_image(self, row: int, pixels: torch.Tensor) -> None:
        """Write the pixels of an image.

        Args:
            row: The row of the image.
            pixels: uint8 [height, width, 3], contiguous, of the size that was written for it.
        """
        content = pixels.numpy().data.cast("B")
        position = int(self.starts[row])
        write_at(self._descriptor, content, position)

    def mark_as_bad(self, row: int) -> None:
        """Give an image that cannot be used the size 0."""
        position = row * _SIZE_BYTES
        write_at(self._descriptor, bytes(_SIZE_BYTES), position)

    def map(self) -> DecodedImages:
        """The images of the finished file, which is mapped into memory."""
        mapped = mmap.mmap(self._descriptor, self.num_bytes)
        content = np.frombuffer(mapped, np.uint8)
        head = content[: self._pixels_start]
        pixels = content[self._pixels_start :]
        # Read again: some of them were marked as bad.
        sizes = head.view(np.int32).reshape(-1, 2)
        heights = sizes[:, 0].astype(np.int64)
        widths = sizes[:, 1].astype(np.int64)
        starts = self.starts - self._pixels_start
        return DecodedImages(heights, widths, starts, pixels)

    @property
    def _pixels_start(self) -> int:
        """The position of the first margin, behind the sizes."""
        return self.num_images * _SIZE_BYTES

    @property
    def _descriptor(self) -> int:
        assert self._opened is not None, "the file is not open"
        return self._opened
