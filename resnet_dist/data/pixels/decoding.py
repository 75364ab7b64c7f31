"""From jobs to decoded pixels: files are read, checked and decoded ahead of their turn.

The next files are read while earlier ones are decoded. Broken images are replaced on the way, also
those that only the decoder refuses.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from resnet_dist.config import DataConfig, DecoderConfig
from resnet_dist.data.pixels.dali import (
    Decoder,
    LoadedJob,
    Portion,
    batch_to_torch,
    split_into_portions,
    windows_to_torch,
)
from resnet_dist.data.pixels.finish import EXACT_RESIZES, FAST_RESIZES
from resnet_dist.data.pixels.parquet_read import open_reader
from resnet_dist.data.pixels.quarantine import Quarantine, Wanted, blank, next_good
from resnet_dist.data.pixels.read import Encoded, Share, broken_image
from resnet_dist.data.pixels.squares import GROUP_VALUES, CropGroup, crop_windows
from resnet_dist.data.pixels.warned_images import WarnedImages
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.sampling.jobs import job_geometry
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import Job
from resnet_dist.logs.decoder_warnings import current_warnings

# Batches whose files are being read while an earlier one is decoded.
_READ_AHEAD = 2

_MAX_PENDING_PIXELS = {"cpu": 2**28, "cuda": 2**30}
"""Decoded pixels of all portions under way, three bytes each. A batch of 1,024 photographs of
ImageNet has 0.2 * 2**30; a single image may have more.
"""


REFUSED = "the decoder refuses it"
"""Why an image is bad whose header looks good."""


@dataclass(frozen=True)
class LoaderSettings:
    """Where and how a loader works; nothing that changes what it shows."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    """that decode and, on the CPU, that resize"""
    output_dir: str
    """folder of quarantine.jsonl"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


# From the number of a view to the function that makes its squares.
CropOf = Callable[[int], CropGroup]

# From the number of a view to its squares: uint8 [n, side, side, 3].
SquaresOf = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class DecodedPortion:
    """A portion whose pixels are in memory: windows on the CPU, or finished squares on a GPU."""

    portion: Portion
    crop: CropOf | None = None
    """makes the squares, of windows on the CPU"""
    group_values: int = GROUP_VALUES
    """values of a group that `crop` makes at a time, where an image has fewer"""
    windows: list[torch.Tensor] = field(default_factory=list)
    """uint8 [height, width, 3] each, if they were decoded one by one"""
    squares: SquaresOf | None = None
    """the squares, on a GPU"""


class PixelSource(Protocol):
    """What turns jobs into pixels."""

    def load(self, job: Job) -> LoadedJob:
        """The job with the rows that it shows and their geometry."""

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The portions of each job, in order."""

    def close(self) -> None:
        """Stop the threads and free the pipelines."""


class PortionQueue:
    """Decodes loaded jobs in portions, a few of them at a time, in order."""

    def __init__(self, decoder: Decoder, device: torch.device, depth: int) -> None:
        """Begin with nothing under way.

        Args:
            decoder: decodes the portions.
            device: where it decodes.
            depth: largest number of portions that it has at the same time.
        """
        self.decoder = decoder
        self.device = device
        self.depth = depth
        self.warned: WarnedImages | None = None

    def submit(self, loaded: LoadedJob) -> Iterator[DecodedPortion]:
        """Start to decode a job; yields the portions that are complete meanwhile."""
        decoder = self.decoder
        max_pixels = _MAX_PENDING_PIXELS[self.device.type]
        is_whole = self.device.type == "cuda"
        for portion in split_into_portions(loaded, max_pixels // 2, is_whole):
            max_others = max_pixels - portion.num_pixels
            while decoder.pending and decoder.pending_pixels > max_others:
                yield self.collect()
            decoder.submit(portion)
            if self.warned is not None:
                self.warned.submitted(portion)
            if len(decoder.pending) >= self.depth:
                yield self.collect()

    def finish(self) -> Iterator[DecodedPortion]:
        """The portions that are still under way."""
        while self.decoder.pending:
            yield self.collect()

    def collect(self) -> DecodedPortion:
        """The oldest portion, decoded.

        Images that the decoder refuses are replaced, and their portion runs again.
        """
        while True:
            try:
                portion, decoded = self.decoder.collect()
                break
            except RuntimeError as failure:
                if not self.replace_undecodable():
                    raise RuntimeError(
                        "DALI failed, though it decodes every image of the batch alone"
                    ) from failure
                self.decoder.restart()
        if self.warned is not None:
            self.warned.check()
        if self.device.type == "cuda":

            def squares(number: int) -> torch.Tensor:
                return batch_to_torch(decoded[number], self.device)

            return DecodedPortion(portion, squares=squares)

        windows = windows_to_torch(decoded[0])
        resizes = FAST_RESIZES if portion.loaded.job.training else EXACT_RESIZES

        def crop(number: int) -> CropGroup:
            return crop_windows(windows, portion, number, resizes)

        return DecodedPortion(portion, crop=crop, windows=windows)

    def replace_undecodable(self) -> bool:
        """Replace images that cannot be decoded. Returns False if no pending portion has one."""
        return False


class ImageDecoding(PortionQueue):
    """Reads and decodes the images of jobs, in order."""

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        quarantine: Quarantine,
        settings: LoaderSettings,
        *,
        local_batch_size: int,
        views: int = 1,
        slots: int = 0,
    ) -> None:
        """Start the reading threads and the pipeline.

        Args:
            index: the images of the split.
            config: the data section of the config.
            quarantine: takes the bad files.
            settings: where to decode, and how.
            local_batch_size: of the largest batch.
            views: number of squares of each image.
            slots: number of augmentation operations on each image.
        """
        self.index = index
        self.config = config
        self.quarantine = quarantine
        self.reader = open_reader(index, config)
        decoder = Decoder(
            local_batch_size=local_batch_size,
            threads=settings.threads,
            device=settings.device,
            views=views,
            slots=slots,
            options=settings.decoder,
        )
        super().__init__(decoder, settings.device, settings.decoder.queue_depth)
        source = current_warnings()
        if source is not None:
            self.warned = WarnedImages(index, decoder, source)

    def close(self) -> None:
        """Stop the threads and free the pipeline."""
        self.reader.close()
        self.decoder.close()

    def decode(self, jobs: Iterable[Job]) -> Generator[DecodedPortion, None, None]:
        """The portions of each job in order, while the next files are being read and decoded.

        Raises:
            ValueError: when more training images are broken than the quarantine tolerates.
        """
        reading: deque[tuple[Job, list[Share]]] = deque()
        try:
            for job in jobs:
                reading.append((job, self.reader.request(job.rows)))
                if len(reading) > _READ_AHEAD:
                    yield from self.submit(self._load_oldest(reading))
            while reading:
                yield from self.submit(self._load_oldest(reading))
            yield from self.finish()
        finally:
            for _, requested in reading:
                for share in requested:
                    share.cancel()
            self.decoder.drop_pending()

    def _load_oldest(self, reading: deque[tuple[Job, list[Share]]]) -> LoadedJob:
        """Remove the oldest job from those that are being read, and wait for its files."""
        job, requested = reading.popleft()
        return self.load(job, requested)

    def load(self, job: Job, requested: list[Share] | None = None) -> LoadedJob:
        """Read the files of a job.

        Bad images are replaced (training) or blacked out (evaluation).

        Args:
            job: The images to read.
            requested: What `reader.request` returned for the job, if it was called already.
        """
        if requested is None:
            requested = self.reader.request(job.rows)
        images = []
        for place, image in enumerate(self.reader.collect(requested)):
            images.append(self._replace_if_bad(job, place, image))
        geometry = self._geometry(job, images)
        return LoadedJob(job, images, geometry)

    def replace_undecodable(self) -> bool:
        """Treat the images that cannot be decoded as bad, in the oldest portion that has some.

        Returns:
            False if no pending portion has one.
        """
        for portion in self.decoder.pending:
            loaded = portion.loaded
            found = self.decoder.find_undecodable(portion)
            if not found:
                continue
            for place in found:
                row = loaded.images[place].row
                broken = broken_image(row, REFUSED)
                loaded.images[place] = self._replace_if_bad(loaded.job, place, broken)
            loaded.geometry = self._geometry(loaded.job, loaded.images)
            return True
        return False

    def _replace_if_bad(self, job: Job, place: int, image: Encoded) -> Encoded:
        """`image` itself, or its replacement if it is bad.

        In training that is the next good image of the index, in evaluation a black one.

        Args:
            job: The job of the image.
            place: Position of the image in the job.
            image: What was read.
        """
        if image.reason is None:
            return image
        if job.training:
            wanted = Wanted(int(job.rows[place]), job.epoch, job.step)
            return next_good(self.index, image, self.quarantine, wanted, self.reader.limits)
        path = self.index.path(image.row)
        self.quarantine.add(path, image.reason)
        return blank(image)

    def _geometry(self, job: Job, images: list[Encoded]) -> Geometry:
        """The windows and views of a job, which depend on the sizes of its images."""
        heights = [image.height for image in images]
        widths = [image.width for image in images]
        return job_geometry(job, np.array(heights), np.array(widths), self.config)
