"""Squares of the training or evaluation size, made on the CPU out of decoded windows.

The threads of the loader resize, crop and mirror a small group of images at a time, which stays in
the processor's cache. Augmentation by DALI follows, for the whole batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from resnet_dist.data.pixels.dali import Augmenter, Portion
from resnet_dist.data.pixels.finish import Resize, disable_openmp_in_thread, resize_and_crop

# From a group of k images of a portion to their squares, uint8 [k, side, side, 3].
CropGroup = Callable[[slice], torch.Tensor]

# Takes the squares of a group of images.
TakeSquares = Callable[[torch.Tensor, slice], None]

# Values that are cropped and normalised together, where an image has fewer. They stay in the cache:
# ten images of 32 pixels, which halves the time of each, or one of 224.
GROUP_VALUES = 32_768


def crop_windows(
    windows: list[torch.Tensor], portion: Portion, number: int, resizes: dict[str, Resize]
) -> CropGroup:
    """Build the function that resizes, crops and mirrors a group of images.

    Args:
        windows: The decoded windows of the portion, uint8 [height, width, 3] each.
        portion: The portion.
        number: Which of the views to make.
        resizes: The functions that resize a window, by the name of the filter.
    """
    geometry = portion.loaded.geometry
    view = geometry.views[number]
    sizes = view.sizes[portion.places].tolist()
    offsets = view.offsets[portion.places].tolist()
    flips = geometry.flips[portion.places].tolist()
    interpolations = geometry.interpolations[portion.places].tolist()

    def crop(group: slice) -> torch.Tensor:
        squares = []
        for i in range(group.start, group.stop):
            size = tuple(sizes[i])
            resize = resizes[interpolations[i]]
            square = resize_and_crop(windows[i], size, offsets[i], flips[i], view.side, resize)
            squares.append(square)
        if len(squares) == 1:
            # Without the copy that torch.stack would make.
            return squares[0][None]
        return torch.stack(squares)

    return crop


class SquareMaker:
    """A pool of threads that makes the squares of a portion."""

    def __init__(self, *, threads: int, slots: int, local_batch_size: int) -> None:
        """Start the threads.

        Args:
            threads: number of threads.
            slots: number of augmentation operations on each image.
            local_batch_size: of the largest batch.
        """
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "resize", initializer=disable_openmp_in_thread)
        self.augmenter = Augmenter(slots=slots, local_batch_size=local_batch_size, threads=threads)

    def close(self) -> None:
        """Stop the threads and free the pipeline."""
        self.pool.shutdown()
        self.augmenter.close()

    def make(
        self,
        crop: CropGroup,
        take: TakeSquares,
        portion: Portion,
        side: int,
        group_values: int = GROUP_VALUES,
    ) -> None:
        """Make the squares of a portion, with the augmentation of its job.

        Args:
            crop: Makes the squares of a group.
            take: Is called with the squares of each group, in any order and in several threads.
            portion: The portion.
            side: Side of the squares.
            group_values: Values of a group, where an image has fewer.
        """
        num_images = portion.stop - portion.start
        groups = split_into_groups(num_images, side, group_values)
        job = portion.loaded.job
        if job.operations is None:

            def crop_and_take(group: slice) -> None:
                take(crop(group), group)

            self._for_each(crop_and_take, groups)
            return

        squares = torch.cat(self._for_each(crop, groups))
        operations = job.operations.select(portion.places)
        augmented = self.augmenter(squares, operations)

        def take_augmented(group: slice) -> None:
            take(augmented[group], group)

        self._for_each(take_augmented, groups)

    def _for_each(self, function: Callable[[slice], Any], groups: list[slice]) -> list[Any]:
        """Call a function with each group, in the pool; returns the results in order.

        With one thread it runs in the calling thread: a second thread would only be waited for,
        and the two would pass Python's lock to and fro.
        """
        if self.threads == 1:
            return [function(group) for group in groups]
        return list(self.pool.map(function, groups))


def split_into_groups(num_images: int, side: int, group_values: int) -> list[slice]:
    """Divide the images of a portion into groups of at most `group_values` values each."""
    values_per_image = 3 * side**2
    group_size = max(1, group_values // values_per_image)
    groups = []
    for first in range(0, num_images, group_size):
        end = min(first + group_size, num_images)
        groups.append(slice(first, end))
    return groups
