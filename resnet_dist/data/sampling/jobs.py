"""What a step shows, as one pure function of the seed and the step."""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.sampling import augment, crops, order
from resnet_dist.data.types import Job
from resnet_dist.rng import epoch_of_repetition


@dataclass(frozen=True)
class TrainSampling:
    """Everything but the seed and the step that decides what a training step shows."""

    num_images: int
    layout: order.BatchLayout
    data: DataConfig
    augment: AugmentConfig

    @property
    def steps_per_epoch(self) -> int:
        """Raises ValueError when the training set is smaller than one global batch."""
        return order.steps_per_epoch(
            self.num_images, self.layout.global_batch_size, self.augment.repeats
        )


def train_job(seed: int, step: int, micro_step: int, sampling: TrainSampling) -> Job:
    """What one micro-step of this rank shows.

    Args:
        seed: The seed of the run.
        step: Number of updates before this one.
        micro_step: Number of micro-batches of this update before this one.
        sampling: Everything else that decides it.
    """
    layout = sampling.layout
    epoch, step_in_epoch = order.locate(step, sampling.steps_per_epoch)
    positions = layout.positions(micro_step)
    repeats = sampling.augment.repeats
    if sampling.augment.mix_block and repeats > 1:
        num_different = layout.global_batch_size // repeats
        positions = order.with_new_partners(positions, num_different)
    rows, repetitions = order.samples_at(
        seed,
        epoch,
        sampling.num_images,
        step_in_epoch,
        positions,
        layout.global_batch_size,
        repeats,
    )
    return _random_job(seed, rows, epoch, step, repetitions, sampling)


def preview_job(seed: int, rows: IntArray, epoch: int, sampling: TrainSampling) -> Job:
    """What an epoch shows of the images `rows` (int64 [n]), wherever they are in its order."""
    num_rows = len(rows)
    repetitions = np.zeros(num_rows, np.int64)
    return _random_job(seed, rows, epoch, 0, repetitions, sampling)


def _random_job(
    seed: int,
    rows: IntArray,
    epoch: int,
    step: int,
    repetitions: IntArray,
    sampling: TrainSampling,
) -> Job:
    config = sampling.augment
    draws = epoch_of_repetition(epoch, repetitions)
    side = crops.train_side(epoch, sampling.data)
    lighting = None
    if config.lighting_std:
        lighting = augment.lighting_shifts(config, seed, draws, rows)
    boxes = None
    if config.random_erasing:
        boxes = augment.erasing_boxes(config, seed, draws, rows, side)
    return Job(
        rows,
        training=True,
        seed=seed,
        epoch=epoch,
        step=step,
        draws=draws,
        side=side,
        operations=augment.plan_operations(config, seed, draws, rows, side),
        lighting=lighting,
        boxes=boxes,
    )


def val_job(rows: IntArray) -> Job:
    """Evaluation of the images `rows`, int64 [n]."""
    return Job(rows, training=False)


def job_geometry(
    job: Job, heights: IntArray, widths: IntArray, config: DataConfig
) -> crops.Geometry:
    """Windows, squares and flips of a job, once the sizes of its images are known.

    Args:
        job: The job of n images.
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        config: The `data` section of the config.
    """
    if not job.training:
        return crops.val_geometry(heights, widths, config)
    return crops.train_geometry(
        job.seed,
        job.draws,
        job.rows,
        heights,
        widths,
        job.side,
        config,
    )
