"""The learning rate as a function of the step, and durations in epochs as steps. Pure functions of numbers.

The laws are torch's `LinearLR` followed by `CosineAnnealingLR` or `MultiStepLR`, in closed form: the learning rate of
a step does not depend on the steps before it, so a resumed run needs no scheduler state.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from resnet_dist.config import ScheduleConfig


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of steps."""
    return round(epochs * steps_per_epoch)


def peak_lr(base_lr: float, base_batch_size: int, global_batch_size: int) -> float:
    """Linear scaling of the learning rate (Goyal et al. 2017, section 2.1); `base_batch_size` 0 leaves `base_lr`."""
    return base_lr * global_batch_size / base_batch_size if base_batch_size else base_lr


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, then cosine or step decay until `total_steps`."""

    kind: str
    peak_lr: float
    total_steps: int
    warmup_steps: int
    warmup_start_factor: float
    milestones: tuple[int, ...]
    gamma: float
    final_lr: float

    def lr(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0.

        Warm-up rises from peak * warmup_start_factor at step 0 to the peak at step `warmup_steps`. The cosine (SGDR,
        Loshchilov and Hutter 2017, equation 5, without restarts) reaches `final_lr` at `total_steps`, one step after
        the last update. Milestones count from the start of the run, warm-up included (Goyal et al. 2017).
        """
        if step < self.warmup_steps:
            start = self.warmup_start_factor
            return self.peak_lr * (start + (1 - start) * step / self.warmup_steps)
        if self.kind == "step":
            return self.peak_lr * self.gamma ** bisect_right(self.milestones, step)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def build_schedule(config: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule with its durations in steps."""
    return Schedule(
        kind=config.kind, peak_lr=peak, total_steps=total_steps,
        warmup_steps=epochs_to_steps(config.warmup_epochs, steps_per_epoch),
        warmup_start_factor=config.warmup_start_factor,
        milestones=tuple(epochs_to_steps(epoch, steps_per_epoch) for epoch in config.milestones),
        gamma=config.gamma, final_lr=config.final_lr,
    )
