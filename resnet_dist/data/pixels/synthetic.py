"""Random images without any file: what the rest of a run can do when reading and decoding cost
nothing.

A small bank of images is made once and drawn from by row, so that a batch costs one copy on the
device. The label belongs to the image, so that a network can learn the set and a loss that stays
where it is shows a fault.
"""

from collections.abc import Iterator

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.sampling import order
from resnet_dist.data.types import Batch
from resnet_dist.distributed import Runtime
from resnet_dist.rng import derive_seed

_BANK_IMAGES = 64


class _SyntheticLoader:
    """Normalised noise, the same for both splits: row r is image r modulo the size of the bank."""

    num_bad = 0

    def __init__(
        self, config: DataConfig, side: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.class_names = tuple(
            f"synthetic{label:04d}" for label in range(config.synthetic_classes)
        )
        # Not of the run's seed, which validation does not have. Labels first: they are those of
        # every side.
        generator = torch.Generator().manual_seed(derive_seed(0, "synthetic"))
        self._labels = torch.randint(
            config.synthetic_classes, (_BANK_IMAGES,), generator=generator
        ).to(device)
        images = torch.randn(_BANK_IMAGES, 3, side, side, generator=generator)
        self._images = images.to(device, dtype, memory_format=torch.channels_last)

    def _batch(self, rows: np.ndarray) -> Batch:
        places = torch.from_numpy(rows % _BANK_IMAGES).to(self._labels.device, non_blocking=True)
        images = self._images[places].contiguous(memory_format=torch.channels_last)
        return Batch(images, self._labels[places], rows)

    def close(self) -> None:
        """Nothing to end."""


class SyntheticTrainLoader(_SyntheticLoader):
    """A TrainLoader of config.synthetic_images random images of config.train_crop_size."""

    fingerprint = "synthetic"

    def __init__(
        self,
        config: DataConfig,
        runtime: Runtime,
        *,
        seed: int,
        dtype: torch.dtype,
        global_batch_size: int,
        grad_accum_steps: int,
    ) -> None:
        """Raises ValueError when the set is smaller than one global batch."""
        super().__init__(config, config.train_crop_size, runtime.device, dtype)
        self.num_samples = config.synthetic_images
        self.steps_per_epoch = order.steps_per_epoch(self.num_samples, global_batch_size)
        self._seed = seed
        self._layout = {
            "global_batch_size": global_batch_size,
            "grad_accum_steps": grad_accum_steps,
            "rank": runtime.rank,
            "world_size": runtime.world_size,
        }

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step), grad_accum_steps of them for each
        step, in order.
        """
        for step in range(start_step, stop_step):
            epoch, inside = order.locate(step, self.steps_per_epoch)
            for micro_step in range(self._layout["grad_accum_steps"]):
                positions = order.micro_step_positions(micro_step, **self._layout)
                yield self._batch(
                    order.samples_at(
                        self._seed,
                        epoch,
                        self.num_samples,
                        inside,
                        positions,
                        self._layout["global_batch_size"],
                    )[0]
                )


class SyntheticValLoader(_SyntheticLoader):
    """A ValLoader of a tenth as many images, of config.val_crop_size."""

    mirrored = False

    def __init__(self, config: DataConfig, runtime: Runtime, *, dtype: torch.dtype) -> None:
        super().__init__(config, config.val_crop_size, runtime.device, dtype)
        self.num_samples = max(1, config.synthetic_images // 10)
        self._shares = order.val_batches(
            self.num_samples, config.val_batch_size, runtime.rank, runtime.world_size
        )
        self.rounds = len(self._shares)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where other ranks still have a batch and this one has not."""
        for share in self._shares:
            yield None if share is None else self._batch(np.array(share, dtype=np.int64))
