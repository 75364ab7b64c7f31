"""Random images without any file: the speed of a run when reading and decoding cost nothing.

A small bank of images is made once and drawn from by row, so that a batch costs one copy on the
device. The label belongs to the image, so that a network can learn the set, and a loss that does
not fall shows a fault.
"""

from collections.abc import Iterator

import numpy as np
import torch

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.sampling import order
from resnet_dist.data.sampling.jobs import TrainSampling, train_job
from resnet_dist.data.types import Batch
from resnet_dist.rng import derive_seed

_BANK_IMAGES = 64


class _SyntheticLoader:
    """Normalised noise, the same for both splits: row r is image r modulo the size of the bank."""

    num_bad = 0

    def __init__(
        self, config: DataConfig, side: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make the bank of images.

        Args:
            config: The `data` section of the config.
            side: Side of the images, in pixels.
            device: Where the bank is kept.
            dtype: Type of the images.
        """
        class_names = []
        for label in range(config.synthetic_classes):
            class_names.append(f"synthetic{label:04d}")
        self.class_names = tuple(class_names)

        # Not the run's seed, which validation does not have. The labels come first, so that they
        # are the same for every side.
        generator = torch.Generator()
        generator.manual_seed(derive_seed(0, "synthetic"))
        labels = torch.randint(config.synthetic_classes, (_BANK_IMAGES,), generator=generator)
        images = torch.randn(_BANK_IMAGES, 3, side, side, generator=generator)
        self._labels = labels.to(device)
        self._images = images.to(device, dtype, memory_format=torch.channels_last)

    def _batch(self, rows: IntArray) -> Batch:
        """The batch of the rows, int64 [n]."""
        places = torch.from_numpy(rows % _BANK_IMAGES)
        places = places.to(self._labels.device, non_blocking=True)
        images = self._images[places]
        images = images.contiguous(memory_format=torch.channels_last)
        labels = self._labels[places]
        return Batch(images, labels, rows)

    def remarks(self) -> list[str]:
        """Nothing to say."""
        return []

    def close(self) -> None:
        """Nothing to stop."""


class SyntheticTrainLoader(_SyntheticLoader):
    """A TrainLoader of `data.synthetic_images` random images of `data.train_crop_size`."""

    fingerprint = "synthetic"

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        layout: order.BatchLayout,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ValueError when the set is smaller than one global batch."""
        super().__init__(config, config.train_crop_size, device, dtype)
        self.num_samples = config.synthetic_images
        self._seed = seed
        self._sampling = TrainSampling(self.num_samples, layout, config, AugmentConfig())
        self.steps_per_epoch = self._sampling.steps_per_epoch

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step) in order, grad_accum_steps of them for
        each step.
        """
        grad_accum_steps = self._sampling.layout.grad_accum_steps
        for step in range(start_step, stop_step):
            for micro_step in range(grad_accum_steps):
                job = train_job(self._seed, step, micro_step, self._sampling)
                yield self._batch(job.rows)


class SyntheticValLoader(_SyntheticLoader):
    """A ValLoader of a tenth as many images, of `data.val_crop_size`."""

    mirrored = False

    def __init__(
        self,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, config.val_crop_size, device, dtype)
        self.num_samples = max(1, config.synthetic_images // 10)
        self._shares = order.val_batches(
            self.num_samples,
            config.val_batch_size,
            rank,
            world_size,
        )
        self.rounds = len(self._shares)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
        for share in self._shares:
            if share is None:
                yield None
            else:
                rows = np.array(share, dtype=np.int64)
                yield self._batch(rows)
