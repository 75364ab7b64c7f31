"""The validation cache: the squares of the first whole evaluation, kept for the later ones.

Each rank keeps its own share in host memory, so that nothing is shared between processes.
"""

import time
from dataclasses import dataclass, field

import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.resources.host_memory import free_host_memory
from resnet_dist.text import memory_size

_SHARE_OF_HOST = 0.25
"""Part of the free memory that the validation caches of a machine may take together."""


@dataclass(frozen=True)
class KeptBatch:
    """One evaluation batch before its normalisation."""

    squares: list[torch.Tensor]
    """uint8 [n, side, side, 3] for each view"""
    labels: torch.Tensor
    """int64 [n]"""
    rows: IntArray
    """int64 [n]"""


@dataclass
class KeptBatches:
    """The batches of this rank; only those of a whole evaluation count."""

    batches: list[KeptBatch] = field(default_factory=list)
    is_complete: bool = False
    seconds: float = 0.0
    """that the evaluation took which filled the cache"""
    started: float = 0.0

    def begin(self) -> None:
        """Forget the batches of an evaluation that was left early."""
        self.batches = []
        self.started = time.perf_counter()

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch."""
        self.batches.append(batch)

    def complete(self) -> None:
        """All batches are there."""
        self.seconds = time.perf_counter() - self.started
        self.is_complete = True

    def describe(self) -> str:
        """What is kept, and what it has cost."""
        num_images = 0
        num_bytes = 0
        for batch in self.batches:
            num_images += len(batch.rows)
            num_bytes += sum(squares.nbytes for squares in batch.squares)
        return (
            f"validation cache: {num_images} images on this rank, {memory_size(num_bytes)}, "
            f"kept from the first evaluation, which took {self.seconds:.0f} s"
        )


def bytes_per_image(config: DataConfig) -> int:
    """The squares of an image in evaluation, in bytes."""
    sides = config.val_scales or (config.val_crop_size,)
    num_crops = 5 if config.val_crops == "ten" else 1
    num_values = 0
    for side in sides:
        num_values += 3 * num_crops * side**2
    return num_values


def fits(config: DataConfig, num_images: int, local_world_size: int) -> str | None:
    """Whether a rank may keep its share of the validation set.

    Args:
        config: The data section.
        num_images: Images of the share.
        local_world_size: Number of ranks on this machine.

    Returns:
        None, or a sentence that says why not.
    """
    num_bytes = num_images * bytes_per_image(config)
    budget = int(_SHARE_OF_HOST * free_host_memory() / local_world_size)
    if num_bytes <= budget:
        return None
    return (
        f"it would take {memory_size(num_bytes)} of each rank, more than its share of the free "
        f"memory of this machine or control group, {memory_size(budget)}"
    )
