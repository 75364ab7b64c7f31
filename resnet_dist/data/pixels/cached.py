"""Training from decoded images in memory: what replaces reading and decoding.

Rows, windows, flips and augmentation come from the same functions as without the cache, and on the
CPU the same kernels make the squares, so that the pixels are equal bit for bit.
"""

from collections.abc import Generator, Iterable

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.pixels.dali import Decoder, LoadedJob, Portion
from resnet_dist.data.pixels.decoded_images import (
    MARGIN,
    DecodedImages,
    SquarePlaces,
    cut_squares,
    cut_squares_on_device,
    resize_equal,
    with_margins,
)
from resnet_dist.data.pixels.decoding import (
    REFUSED,
    DecodedPortion,
    LoaderSettings,
    PixelSource,
    PortionQueue,
    SquaresOf,
)
from resnet_dist.data.pixels.finish import resize_fast, to_device
from resnet_dist.data.pixels.quarantine import Quarantine
from resnet_dist.data.pixels.read import Encoded, load, read_limits
from resnet_dist.data.pixels.squares import CropGroup, crop_windows
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.sampling.jobs import job_geometry
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import Job

# Values that are cropped together: 64 images of 32 pixels, whose cost is that of a few calls.
_GROUP_VALUES = 2**18


class CachedRows:
    """Finds what a job shows: the rows of good images, and their geometry."""

    def __init__(
        self, cache: DecodedImages, index: Index, config: DataConfig, quarantine: Quarantine
    ) -> None:
        self.cache = cache
        self.index = index
        self.config = config
        self.quarantine = quarantine

    def load(self, job: Job) -> LoadedJob:
        """The job with the rows that it shows.

        Raises:
            ValueError: when more images are broken than the quarantine tolerates.
        """
        rows = self._replace_bad(job)
        heights = self.cache.heights[rows]
        widths = self.cache.widths[rows]
        geometry = job_geometry(job, heights, widths, self.config)
        return LoadedJob(job, [], geometry, rows)

    def _replace_bad(self, job: Job) -> IntArray:
        """The rows of a job, with the next good image of the index in place of each bad one."""
        bad_places = np.flatnonzero(self.cache.is_bad[job.rows])
        if not len(bad_places):
            return job.rows
        rows: IntArray = job.rows.copy()
        for place in bad_places:
            rows[place] = self._next_good(int(rows[place]), job)
        return rows

    def _next_good(self, wanted: int, job: Job) -> int:
        """The first good row from `wanted` on, which wraps around; bad ones are recorded."""
        row = wanted
        while self.cache.is_bad[row]:
            path = self.index.path(row)
            if path not in self.quarantine.files:
                reason = load(self.index, row, read_limits(self.config)).reason or REFUSED
                self.quarantine.add(path, reason, epoch=job.epoch, step=job.step)
            row = (row + 1) % len(self.index)
            if row == wanted:
                raise ValueError(
                    f"none of the {len(self.index)} images in {self.index.root} can be decoded; "
                    f"the reasons are in {self.quarantine.path}"
                )
        return row


class CachedWindows:
    """Decoded windows on the CPU, for squares that are made there."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows
        self.cache = rows.cache

    def close(self) -> None:
        """Nothing to stop."""

    def load(self, job: Job) -> LoadedJob:
        """The job with the rows that it shows."""
        return self.rows.load(job)

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The jobs in order, each as one portion."""
        for job in jobs:
            loaded = self.load(job)
            portion = Portion(loaded, 0, len(job.rows))
            yield self._decoded(portion)

    def _decoded(self, portion: Portion) -> DecodedPortion:
        """The portion with the function that makes its squares."""
        size = self.cache.common_size
        cut = None
        if size is not None:
            cut = self._cut_equal(portion, size)
        if cut is None:
            return self._crop_one_by_one(portion)
        cut_group = cut

        def crop(number: int) -> CropGroup:
            assert number == 0, "training has one view"
            return cut_group

        return DecodedPortion(portion, crop=crop, group_values=_GROUP_VALUES)

    def _crop_one_by_one(self, portion: Portion) -> DecodedPortion:
        """The portion with its windows, which are handled like decoded ones."""
        geometry = portion.loaded.geometry
        rows = portion.loaded.shown_rows()
        windows = []
        for row, window in zip(rows.tolist(), geometry.windows.tolist(), strict=True):
            y, x, height, width = window
            pixels = self.cache.image(row)[y : y + height, x : x + width]
            # The fast kernel of torch wants it so.
            windows.append(pixels.contiguous())

        def crop(number: int) -> CropGroup:
            return crop_windows(windows, portion, number, resize_fast)

        return DecodedPortion(portion, crop=crop)

    def _cut_equal(self, portion: Portion, size: tuple[int, int]) -> CropGroup | None:
        """A crop of whole groups at once, for images of one size that are resized to one size.

        Returns:
            None if the images are resized differently.
        """
        geometry = portion.loaded.geometry
        resized = common_resize(geometry, size)
        if resized is None:
            return None
        (view,) = geometry.views
        places = SquarePlaces(view.offsets, geometry.flips, view.side)
        margin = 3 * (view.side + int(np.abs(view.offsets).max()))
        if margin > MARGIN:
            return None
        rows = portion.loaded.shown_rows()
        cache = self.cache

        def cut(group: slice) -> torch.Tensor:
            return cut_squares(cache.pixels, cache.starts[rows[group]], size, places.part(group))

        def resize_and_cut(group: slice) -> torch.Tensor:
            images = resize_equal(cache.equal_images(rows[group], size), resized)
            pixels, starts = with_margins(images, margin)
            return cut_squares(pixels, starts, resized, places.part(group))

        if resized == size:
            return cut
        return resize_and_cut


def common_resize(geometry: Geometry, size: tuple[int, int]) -> tuple[int, int] | None:
    """The (height, width) that all images of a batch are resized to as a whole.

    Args:
        geometry: Of a training batch.
        size: (height, width) of every image.

    Returns:
        None if the windows are parts of the images, or if the sizes differ.
    """
    (view,) = geometry.views
    whole = np.array([0, 0, *size])
    resized = view.sizes[0]
    if not (geometry.windows == whole).all() or not (view.sizes == resized).all():
        return None
    return int(resized[0]), int(resized[1])


class CachedSquaresOnDevice:
    """Squares that a GPU cuts out of images in its own memory, which are not resized."""

    def __init__(self, rows: CachedRows, images: torch.Tensor) -> None:
        self.rows = rows
        self.images = images

    def close(self) -> None:
        """Nothing to stop."""

    def load(self, job: Job) -> LoadedJob:
        """The job with the rows that it shows."""
        return self.rows.load(job)

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The jobs in order, each as one portion."""
        for job in jobs:
            loaded = self.load(job)
            yield DecodedPortion(
                Portion(loaded, 0, len(job.rows)), squares=self._squares_of(loaded)
            )

    def _squares_of(self, loaded: LoadedJob) -> SquaresOf:
        geometry = loaded.geometry
        (view,) = geometry.views

        def squares(number: int) -> torch.Tensor:
            # One copy for all numbers.
            numbers = np.column_stack([loaded.shown_rows(), view.offsets, geometry.flips])
            on_device = to_device(torch.from_numpy(numbers), self.images.device)
            return cut_squares_on_device(
                self.images, on_device[:, 0], on_device[:, 1:3], on_device[:, 3], view.side
            )

        return squares


class CachedSquaresByDali(PortionQueue):
    """Squares that DALI makes on a GPU out of images in host memory."""

    def __init__(
        self, rows: CachedRows, settings: LoaderSettings, *, local_batch_size: int, slots: int
    ) -> None:
        """Start the pipeline, with the arguments of `decoding.ImageDecoding`."""
        decoder = Decoder(
            local_batch_size=local_batch_size,
            threads=settings.threads,
            device=settings.device,
            slots=slots,
            options=settings.decoder,
            is_decoded=True,
        )
        super().__init__(decoder, settings.device, settings.decoder.queue_depth)
        self.rows = rows

    def close(self) -> None:
        """Free the pipeline."""
        self.decoder.close()

    def load(self, job: Job) -> LoadedJob:
        """The job with its images."""
        loaded = self.rows.load(job)
        for row in loaded.shown_rows().tolist():
            pixels = self.rows.cache.image(row)
            height, width, _ = pixels.shape
            image = Encoded(row, pixels.numpy().data, height, width)
            loaded.images.append(image)
        return loaded

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The portions of each job, in order."""
        try:
            for job in jobs:
                yield from self.submit(self.load(job))
            yield from self.finish()
        finally:
            self.decoder.drop_pending()


def cached_source(
    rows: CachedRows, settings: LoaderSettings, *, local_batch_size: int, slots: int
) -> PixelSource:
    """What makes pixels out of the cache on a device.

    Args:
        rows: What a job shows.
        settings: Where and how the loader works.
        local_batch_size: Of the largest batch.
        slots: Number of augmentation operations on each image.
    """
    if settings.device.type == "cpu" or not needs_dali(rows.cache, rows.config, slots):
        if rows.cache.on_device is not None:
            return CachedSquaresOnDevice(rows, rows.cache.on_device)
        return CachedWindows(rows)
    return CachedSquaresByDali(rows, settings, local_batch_size=local_batch_size, slots=slots)


def needs_dali(cache: DecodedImages, config: DataConfig, slots: int) -> bool:
    """Whether a GPU has to resize or augment, which DALI does."""
    size = cache.common_size
    if slots or size is None or config.train_crop != "pad":
        return True
    is_resized = min(size) != config.train_crop_size
    return is_resized or config.progressive_start_size > 0
