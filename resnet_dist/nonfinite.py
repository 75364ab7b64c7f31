"""Updates whose gradient is not finite: undo them, count them, and report their images."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from resnet_dist.data.types import TrainLoader
from resnet_dist.distributed import Runtime
from resnet_dist.files import write_file
from resnet_dist.schedule import Schedule


class TooManyNonFiniteError(FloatingPointError):
    """Too many updates in a row were skipped."""

    def __init__(self, text: str, first: int, last: int) -> None:
        """`first` and `last` are the numbers of the skipped updates, counted from 1."""
        super().__init__(text)
        self.first = first
        self.last = last


class NonFinite:
    """Undoes and counts updates whose gradient is not finite, without waiting for the device.

    The optimizer skips such an update (see `engine.train_step`). Its forward pass has changed the
    running statistics already; this class puts them back.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        """`step` is the number of updates done before."""
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.snapshot = [torch.empty_like(buffer) for buffer in self.statistics]
        device = next(model.parameters()).device
        self.step = torch.full((), step, dtype=torch.int64, device=device)
        counters = torch.zeros(4, dtype=torch.int64, device=device)
        self.in_row, self.longest, self.longest_end, self.total = counters.unbind()

    def snapshot_statistics(self) -> None:
        """Copy the running statistics as they are before the forward pass."""
        if self.statistics:
            torch._foreach_copy_(self.snapshot, self.statistics)

    def restore_if_skipped(self, skipped: torch.Tensor) -> None:
        """Count an update; put the statistics back if it is skipped (a bool scalar)."""
        for before, now in zip(self.snapshot, self.statistics, strict=True):
            torch.where(skipped, before, now, out=now)
        self.step.add_(1)
        self.total.add_(skipped)
        self.in_row.add_(1).mul_(skipped)
        longer = self.in_row > self.longest
        torch.where(longer, self.in_row, self.longest, out=self.longest)
        torch.where(longer, self.step, self.longest_end, out=self.longest_end)

    def longest_row(self) -> tuple[int, int]:
        """First and last of the most updates in a row that were skipped, counted from 1.

        The last is 0 if none was skipped. Waits for the device.
        """
        length, end = torch.stack([self.longest, self.longest_end]).tolist()
        return end - length + 1, end


def write_replay(
    problem: TooManyNonFiniteError,
    folder: Path,
    loader: TrainLoader,
    schedule: Schedule,
    runtime: Runtime,
) -> None:
    """Write nonfinite.json, which names the images of the skipped updates; called by every rank.

    Steps count from 0, as everywhere else. For each of them: the learning rate, and for each rank
    the rows of its micro-batches.
    """
    steps = range(problem.first - 1, problem.last)
    own_rows = [batch.indices.tolist() for batch in loader.batches(steps.start, steps.stop)]
    rows_of_ranks: list[list[list[int]]] = [[] for _ in range(runtime.world_size)]
    dist.all_gather_object(rows_of_ranks, own_rows, group=runtime.cpu_group)

    index = getattr(loader, "index", None)
    files = {}
    if index is not None:
        rows = {row for batches in rows_of_ranks for batch in batches for row in batch}
        files = {row: index.path(row) for row in sorted(rows)}
    content = {
        "steps": list(steps),
        "lr": [schedule.lr(step) for step in steps],
        "rows_of_ranks": rows_of_ranks,
        "files": files,
    }
    runtime.on_main(lambda: write_file(folder / "nonfinite.json", json.dumps(content)))
