"""What the data path hands to the engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

IGNORED_LABEL = -100
"""Label of an evaluation image that could not be decoded: no loss, never a hit, but counted
(torch's ignore_index).
"""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, ready for the model."""

    images: torch.Tensor
    """[B, 3, H, W] in channels_last memory, normalised, in the training precision, on the rank's
    device"""
    labels: torch.Tensor
    """int64 [B], class ids, on the rank's device"""
    indices: np.ndarray
    """int64 [B], rows of the data set's index, on the host"""
    other_views: tuple[torch.Tensor, ...] = ()
    """in evaluation: further crops of the same images, each as `images`, of its own side"""


class Loader(Protocol):
    """This rank's share of a split."""

    num_samples: int
    """of all ranks"""
    class_names: tuple[str, ...]
    num_bad: int
    """broken images that this rank has met so far"""

    def close(self) -> None:
        """End the reader threads and free the pipeline."""


class TrainLoader(Loader, Protocol):
    """The training set, addressed by step."""

    steps_per_epoch: int
    fingerprint: str
    """changes with the list of samples: names, order or classes"""

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step), grad_accum_steps of them for each
        step, in order.
        """


class ValLoader(Loader, Protocol):
    """The validation set: over all ranks, every image exactly once."""

    rounds: int
    """how many items an iteration yields: the same on every rank"""
    mirrored: bool
    """whether each view counts together with its mirror image"""

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where other ranks still have a batch and this one has not."""
