"""Training from decoded images in memory: what replaces reading and decoding.

Rows, windows, flips and augmentation come from the same functions as without the cache, and on the
CPU the same kernels make the squares, so that the pixels are equal bit for bit.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass

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
)
from resnet_dist.data.pixels.finish import FAST_RESIZES, to_device
from resnet_dist.data.pixels.quarantine import Quarantine
from resnet_dist.data.pixels.read import Encoded, load, read_limits
from resnet_dist.data.pixels.small_resize import (
    ResizedWindows,
    filter_numbers,
    fits_products,
    resize_windows,
)
from resnet_dist.data.pixels.squares import GROUP_VALUES, CropGroup, crop_windows
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.sampling.jobs import job_geometry
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import Job

# Values of images of one size that are cropped together: 64 images of 32 pixels, whose cost is that
# of a few calls.
_GROUP_VALUES_OF_EQUAL = 2**18


@dataclass(frozen=True)
class CachedRows:
    """Finds what a job shows: the rows of good images, and their geometry."""

    cache: DecodedImages
    index: Index
    """of all images"""
    config: DataConfig
    quarantine: Quarantine
    """has the bad images that training has met"""

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
        is_bad = self.cache.is_bad[job.rows]
        bad_places = np.flatnonzero(is_bad)
        if len(bad_places) == 0:
            return job.rows
        rows: IntArray = job.rows.copy()
        for place in bad_places:
            rows[place] = self._next_good(int(rows[place]), job)
        return rows

    def _next_good(self, wanted: int, job: Job) -> int:
        """The first good row from `wanted` on, which wraps around; bad ones are recorded."""
        row = wanted
        while self.cache.is_bad[row]:
            self._record(row, job)
            row = (row + 1) % len(self.index)
            if row == wanted:
                raise ValueError(
                    f"none of the {len(self.index)} images in {self.index.root} can be decoded; "
                    f"the reasons are in {self.quarantine.path}"
                )
        return row

    def _record(self, row: int, job: Job) -> None:
        """Record a bad image once. Raises ValueError if there are too many."""
        path = self.index.path(row)
        if path in self.quarantine.files:
            return
        # The cache does not keep the reasons.
        image = load(self.index, row, read_limits(self.config))
        reason = image.reason or REFUSED
        self.quarantine.add(path, reason, epoch=job.epoch, step=job.step)


class _CachedSource:
    """A `PixelSource` whose jobs are one portion each: the images are in memory already."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows

    def close(self) -> None:
        """Nothing to stop."""

    def load(self, job: Job) -> LoadedJob:
        """The job with the rows that it shows."""
        return self.rows.load(job)

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The jobs in order."""
        for job in jobs:
            loaded = self.load(job)
            portion = Portion(loaded, 0, len(job.rows))
            yield self.decode_portion(portion)

    def decode_portion(self, portion: Portion) -> DecodedPortion:
        """The portion with the function that makes its squares."""
        raise NotImplementedError


class CachedWindows(_CachedSource):
    """Decoded windows on the CPU, for squares that are made there."""

    def decode_portion(self, portion: Portion) -> DecodedPortion:
        """The portion with the function that makes its squares."""
        small = self._small_windows(portion)
        if small is not None:
            return _with_one_view(portion, small.resize, _GROUP_VALUES_OF_EQUAL)
        equal = self._equal_images(portion)
        if equal is None:
            crop = self._crop_one_by_one(portion)
            return _with_one_view(portion, crop, GROUP_VALUES)
        crop = equal.resize_and_crop
        if equal.resized == equal.size:
            crop = equal.crop
        return _with_one_view(portion, crop, _GROUP_VALUES_OF_EQUAL)

    def _crop_one_by_one(self, portion: Portion) -> CropGroup:
        """A crop of windows, which are handled like decoded ones."""
        geometry = portion.loaded.geometry
        rows = portion.loaded.shown_rows()
        windows = []
        for row, window in zip(rows.tolist(), geometry.windows.tolist(), strict=True):
            y, x, height, width = window
            image = self.rows.cache.image(row)
            pixels = image[y : y + height, x : x + width]
            # The fast kernel of torch wants it so.
            windows.append(pixels.contiguous())
        return crop_windows(windows, portion, 0, FAST_RESIZES)

    def _small_windows(self, portion: Portion) -> "_SmallWindows | None":
        """The windows of a portion, if whole groups of them can be resized at once.

        Returns:
            None also if the squares are not the whole windows.
        """
        cache = self.rows.cache
        geometry = portion.loaded.geometry
        (view,) = geometry.views
        size = cache.common_size
        if size is None or not fits_products(size, view.side):
            return None
        is_resized_otherwise = np.any(view.sizes != view.side)
        is_shifted = np.any(view.offsets)
        if is_resized_otherwise or is_shifted:
            return None
        rows = portion.loaded.shown_rows()
        filters = filter_numbers(geometry.interpolations)
        wanted = ResizedWindows(geometry.windows, filters, geometry.flips, view.side)
        return _SmallWindows(cache, rows, size, wanted)

    def _equal_images(self, portion: Portion) -> "_EqualImages | None":
        """The images of a portion, if whole groups of them can be handled at once.

        Returns:
            None if the images differ in size, or if they are resized differently.
        """
        cache = self.rows.cache
        geometry = portion.loaded.geometry
        size = cache.common_size
        if size is None:
            return None
        resized = common_resize(geometry, size)
        if resized is None:
            return None
        interpolation = geometry.interpolations[0]
        is_same_filter = np.all(geometry.interpolations == interpolation)
        if resized != size and not is_same_filter:
            return None
        (view,) = geometry.views
        places = SquarePlaces(view.offsets, geometry.flips, view.side)
        if places.margin > MARGIN:
            return None
        rows = portion.loaded.shown_rows()
        return _EqualImages(cache, rows, size, resized, interpolation, places)


def _with_one_view(portion: Portion, crop_group: CropGroup, group_values: int) -> DecodedPortion:
    """A portion of training, which has one view.

    Args:
        portion: The portion.
        crop_group: Makes the squares of a group.
        group_values: Values of a group.
    """

    def crop(number: int) -> CropGroup:
        assert number == 0, "training has one view"
        return crop_group

    return DecodedPortion(portion, crop=crop, group_values=group_values)


@dataclass(frozen=True)
class _SmallWindows:
    """Images of one small size, and the windows in them that are resized to squares."""

    cache: DecodedImages
    rows: IntArray
    """int64 [n]: the images"""
    size: tuple[int, int]
    """(height, width) of each image"""
    wanted: ResizedWindows

    def resize(self, group: slice) -> torch.Tensor:
        """The squares of a group of images."""
        rows = self.rows[group]
        wanted = self.wanted.select(group)
        images = self.cache.equal_images(rows, self.size)
        return resize_windows(images, wanted)


@dataclass(frozen=True)
class _EqualImages:
    """Images of one size that are resized to one size, and the squares that are cut out of them."""

    cache: DecodedImages
    rows: IntArray
    """int64 [n]: the images"""
    size: tuple[int, int]
    """(height, width) of each image"""
    resized: tuple[int, int]
    """the same after the images were resized"""
    interpolation: str
    """the filter that resizes them"""
    places: SquarePlaces
    """the squares in the resized images"""

    def crop(self, group: slice) -> torch.Tensor:
        """The squares of a group of images that are not resized."""
        rows = self.rows[group]
        starts = self.cache.starts[rows]
        places = self.places.select(group)
        return cut_squares(self.cache.pixels, starts, self.size, places)

    def resize_and_crop(self, group: slice) -> torch.Tensor:
        """The squares of a group of images."""
        rows = self.rows[group]
        places = self.places.select(group)
        images = self.cache.equal_images(rows, self.size)
        resized = resize_equal(images, self.resized, self.interpolation)
        pixels, starts = with_margins(resized, self.places.margin)
        return cut_squares(pixels, starts, self.resized, places)


def common_resize(geometry: Geometry, size: tuple[int, int]) -> tuple[int, int] | None:
    """The (height, width) that all images of a batch are resized to as a whole.

    Args:
        geometry: Of a training batch.
        size: (height, width) of every image.

    Returns:
        None if the windows are parts of the images, or if the sizes differ.
    """
    (view,) = geometry.views
    whole_window = np.array([0, 0, *size])
    if np.any(geometry.windows != whole_window):
        return None
    first = view.sizes[0]
    if np.any(view.sizes != first):
        return None
    height, width = first.tolist()
    return height, width


class CachedSquaresOnDevice(_CachedSource):
    """Squares that a GPU cuts out of images in its own memory, which are not resized."""

    def __init__(self, rows: CachedRows, images: torch.Tensor) -> None:
        """Take images that are on the GPU.

        Args:
            rows: What a job shows.
            images: uint8 [N, height, width, 3].
        """
        super().__init__(rows)
        self.images = images

    def decode_portion(self, portion: Portion) -> DecodedPortion:
        """The portion with the function that makes its squares."""
        loaded = portion.loaded
        geometry = loaded.geometry
        (view,) = geometry.views

        def squares(number: int) -> torch.Tensor:
            # One copy for all numbers.
            columns = [loaded.shown_rows(), view.offsets, geometry.flips]
            numbers = torch.from_numpy(np.column_stack(columns))
            on_device = to_device(numbers, self.images.device)
            rows = on_device[:, 0]
            offsets = on_device[:, 1:3]
            flips = on_device[:, 3]
            return cut_squares_on_device(self.images, rows, offsets, flips, view.side)

        return DecodedPortion(portion, squares=squares)


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
            data = pixels.numpy().data
            image = Encoded(row, data, height, width)
            loaded.images.append(image)
        return loaded

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The portions of each job, in order."""
        try:
            for job in jobs:
                loaded = self.load(job)
                yield from self.submit(loaded)
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
    on_gpu = settings.device.type == "cuda"
    if on_gpu and needs_dali(rows.cache, rows.config, slots):
        return CachedSquaresByDali(rows, settings, local_batch_size=local_batch_size, slots=slots)
    images = rows.cache.on_device
    if images is not None:
        return CachedSquaresOnDevice(rows, images)
    return CachedWindows(rows)


def needs_dali(cache: DecodedImages, config: DataConfig, slots: int) -> bool:
    """Whether a GPU has to resize or augment, which DALI does."""
    size = cache.common_size
    if slots or size is None or config.train_crop != "pad":
        return True
    is_resized = min(size) != config.train_crop_size
    is_progressive = config.progressive_start_size > 0
    return is_resized or is_progressive
