"""Handle updates whose gradient is not finite: undo them, count them, report their images."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from resnet_dist.data.types import TrainLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.files import write_file
from resnet_dist.schedule import Schedule


class TooManyNonFiniteError(FloatingPointError):
    """Too many consecutive updates were skipped."""

    def __init__(
        self,
        text: str,
        first: int,
        last: int,
    ) -> None:
        """Create the error.

        Args:
            text: The message.
            first: Number of the first skipped update, counted from 1.
            last: Number of the last skipped update.
        """
        super().__init__(text)
        self.first = first
        self.last = last


class NonFinite:
    """Undoes and counts updates whose gradient is not finite, without waiting for the device.

    The optimizer skips such an update (see `engine.train_step`). By then, the forward pass has
    already changed the running statistics of batch norm. This class restores them.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        """Create the counters on the device of the model.

        Args:
            model: The network.
            step: Number of updates that are already done.
        """
        # The running statistics, each as a vector that shares its memory.
        self.statistics: list[torch.Tensor] = []
        sizes = []
        for buffer in model.buffers():
            if buffer.is_floating_point():
                self.statistics.append(buffer.view(-1))
                sizes.append(buffer.numel())
        # Their values before the forward pass, one after the other.
        self.snapshot: torch.Tensor | None = None
        self._sizes = sizes
        device = next(model.parameters()).device
        self.step = torch.full((), step, dtype=torch.int64, device=device)
        counters = torch.zeros(4, dtype=torch.int64, device=device)
        # Number of skipped updates: now in a row, the longest row, and in all. `longest_end` is the
        # number of the last update of the longest row.
        self.in_row, self.longest, self.longest_end, self.total = counters.unbind()

    def snapshot_statistics(self) -> None:
        """Copy the running statistics. Call this before the forward pass."""
        if self.statistics:
            self.snapshot = torch.cat(self.statistics)

    def restore_if_skipped(self, skipped: torch.Tensor) -> None:
        """Count an update, and restore the running statistics if it was skipped.

        All statistics are handled as one vector: ResNet-50 has 106, and a kernel for each would
        take longer to launch than to run.

        Args:
            skipped: bool scalar on the device of the model.
        """
        if self.statistics:
            assert self.snapshot is not None, "call snapshot_statistics before the forward pass"
            now = torch.cat(self.statistics)
            kept = torch.where(skipped, self.snapshot, now)
            torch._foreach_copy_(self.statistics, torch.split(kept, self._sizes))
        self.step.add_(1)
        self.total.add_(skipped)
        # A good update resets the row to 0.
        self.in_row.add_(1)
        self.in_row.mul_(skipped)
        is_longer = self.in_row > self.longest
        torch.where(
            is_longer,
            self.in_row,
            self.longest,
            out=self.longest,
        )
        torch.where(
            is_longer,
            self.step,
            self.longest_end,
            out=self.longest_end,
        )

    def longest_row(self) -> tuple[int, int]:
        """The longest row of consecutive skipped updates. Waits for the device.

        Returns:
            The numbers of its first and last update, counted from 1. The last is 0 if no update was
            skipped.
        """
        length, last = torch.stack([self.longest, self.longest_end]).tolist()
        first = last - length + 1
        return first, last


def write_replay(
    problem: TooManyNonFiniteError,
    folder: Path,
    loader: TrainLoader,
    schedule: Schedule,
    runtime: Runtime,
) -> None:
    """Write nonfinite.json, which lists the images of the skipped updates. Call it on every rank.

    The file holds the steps (counted from 0, as in the log), the learning rate of each step, for
    each rank the sample indices of its micro-batches, and the file name of each index.

    Args:
        problem: The error, which says which updates were skipped.
        folder: Where the main process writes the file.
        loader: The training data.
        schedule: The learning rate schedule.
        runtime: The process group.
    """
    steps = range(problem.first - 1, problem.last)
    own_rows = []
    for batch in loader.batches(steps.start, steps.stop):
        own_rows.append(batch.indices.tolist())
    rows_of_ranks: list[list[list[int]]] = [[] for _ in range(runtime.world_size)]
    dist.all_gather_object(
        rows_of_ranks,
        own_rows,
        group=runtime.cpu_group,
    )

    content = {
        "steps": list(steps),
        "lr": [schedule.lr(step) for step in steps],
        "rows_of_ranks": rows_of_ranks,
        "files": _file_names(loader, rows_of_ranks),
    }
    text = json.dumps(content)
    runtime.on_main(lambda: write_file(folder / "nonfinite.json", text))


def _file_names(
    loader: TrainLoader,
    rows_of_ranks: list[list[list[int]]],
) -> dict[int, str]:
    """The file name of each sample index. Empty for data that has no files."""
    index = getattr(loader, "index", None)
    if index is None:
        return {}
    rows = set()
    for micro_batches in rows_of_ranks:
        for micro_batch in micro_batches:
            rows.update(micro_batch)
    return {row: index.path(row) for row in sorted(rows)}
