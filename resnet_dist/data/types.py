"""What the data path hands on: jobs on their way in, batches on their way out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from resnet_dist.data.arrays import FloatArray, IntArray

IGNORED_LABEL = -100
"""Label of an evaluation image that could not be decoded: it adds no loss and is never a hit, but
it is counted (PyTorch's ignore_index).
"""


@dataclass(frozen=True)
class OperationPlan:
    """The operations of the augmentation on each image of a batch, in their order.

    There are K slots for each image; a slot that is not used holds the identity.
    """

    ops: np.ndarray[Any, np.dtype[np.int32]]
    """int32 [n, K]: operation ids, places in `operations.NAMES`"""
    params: FloatArray
    """float32 [n, K]: the parameter of each operation, in its own unit (see operations.py)"""
    matrices: FloatArray
    """float32 [n, K, 3, 3]: what DALI gets in place of the parameter (see operations.py)"""

    def select(self, places: slice) -> "OperationPlan":
        """The plan of some images of the batch."""
        ops = self.ops[places]
        params = self.params[places]
        matrices = self.matrices[places]
        return OperationPlan(ops, params, matrices)


@dataclass(frozen=True)
class Job:
    """What one micro-batch of one rank shows: numbers only, before any file is read.

    Windows and flips are not in it, since they depend on the size of each image: they follow from
    the job and the sizes (`jobs.job_geometry`).
    """

    rows: IntArray
    """int64 [n]: the rows of the index that are shown"""
    training: bool
    """whether images are cropped at random, and bad ones replaced; else this is evaluation"""
    seed: int = 0
    """seed of windows and flips"""
    epoch: int = 0
    step: int = 0
    draws: IntArray | int = 0
    """the epoch and the repetition, where an epoch shows an image several times, as one number
    (`rng.epoch_of_repetition`): int64 [n], or one for all images"""
    side: int = 0
    """side of the training crop, in pixels"""
    operations: OperationPlan | None = None
    """operations of the augmentation; None for none"""
    lighting: FloatArray | None = None
    """float32 [n, 3]: what PCA lighting adds to R, G and B; None for none"""
    boxes: IntArray | None = None
    """int64 [n, 4]: the rectangles (y, x, height, width) that are erased; None for none"""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, ready for the model."""

    images: torch.Tensor
    """[B, 3, H, W] in channels_last memory, normalised, in the training precision, on the rank's
    device"""
    labels: torch.Tensor
    """int64 [B], class ids, on the rank's device"""
    indices: IntArray
    """int64 [B], rows of the data set's index, on the host"""
    other_views: tuple[torch.Tensor, ...] = ()
    """in evaluation: further crops of the same images, each like `images` but with a side of its
    own"""


class Loader(Protocol):
    """This rank's share of a split."""

    num_samples: int
    """number of images of all ranks together"""
    class_names: tuple[str, ...]

    @property
    def num_bad(self) -> int:
        """Number of broken images that this rank has met so far."""

    def remarks(self) -> list[str]:
        """Sentences for the log, each once: what is kept in memory, or why not."""

    def close(self) -> None:
        """Stop the reader threads and free the pipeline."""


class TrainLoader(Loader, Protocol):
    """The training set, addressed by step."""

    steps_per_epoch: int
    fingerprint: str
    """hash of the list of samples: it changes with their names, their order and their classes"""

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step) in order, grad_accum_steps of them for
        each step.
        """


class ValLoader(Loader, Protocol):
    """The validation set: over all ranks, every image exactly once."""

    rounds: int
    """number of items of an iteration; the same on every rank"""
    mirrored: bool
    """whether each view is averaged with its mirror image"""

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
