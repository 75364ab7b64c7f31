"""The learning rate of each step, and durations in epochs as steps. Pure functions of numbers.

The laws are torch's `LinearLR` or `ConstantLR`, then `CosineAnnealingLR`, `MultiStepLR`,
`PolynomialLR` or `StepLR`, in closed form. The learning rate of a step does not depend on the steps
before it, so that a resumed run needs no state of it.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from resnet_dist.config import ScheduleConfig


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of steps."""
    return round(epochs * steps_per_epoch)


def peak_lr(base_lr: float, base_batch_size: int, global_batch_size: int) -> float:
    """Linear scaling of the learning rate (Goyal et al. 2017, section 2.1).

    With a `base_batch_size` of 0 it is `base_lr`.
    """
    if not base_batch_size:
        return base_lr
    return base_lr * global_batch_size / base_batch_size


@dataclass(frozen=True)
class Schedule:
    """Warm-up over `warmup_steps`, then the decay that `kind` names, until `total_steps`."""

    kind: str
    peak_lr: float
    total_steps: int
    warmup_steps: int
    warmup_kind: str
    warmup_start_factor: float
    milestones: tuple[int, ...]
    gamma: float
    decay_steps: int
    power: float
    final_lr: float

    def lr(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0.

        Milestones and the exponential's decays count from the start of the run, warm-up included
        (Goyal et al. 2017; TensorFlow's code of Inception v3 and of EfficientNet).
        """
        if step < self.warmup_steps:
            return self.peak_lr * self._warmup_factor(step)
        if self.kind == "step":
            return self.peak_lr * self.gamma ** bisect_right(self.milestones, step)
        if self.kind == "exponential":
            return self.peak_lr * self.gamma ** (step // self.decay_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * self._remaining(step)

    def _warmup_factor(self, step: int) -> float:
        """The factor on the peak during warm-up.

        Linear: it rises from `warmup_start_factor` at step 0 to 1 at step `warmup_steps`. Constant:
        it stays at the former (Goyal et al. 2017, section 2.2).
        """
        start = self.warmup_start_factor
        if self.warmup_kind == "constant":
            return start
        return start + (1 - start) * step / self.warmup_steps

    def _remaining(self, step: int) -> float:
        """The part of the way from the final to the peak learning rate that is left, 1 to 0.

        It is 0 at `total_steps`, one step after the last update. Cosine: SGDR, Loshchilov and
        Hutter 2017, equation 5, without restarts. Polynomial: power 2 in MLPerf's LARS reference.
        """
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        if self.kind == "polynomial":
            return float((1 - progress) ** self.power)
        return (1 + math.cos(math.pi * progress)) / 2


def build_schedule(
    config: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int
) -> Schedule:
    """The schedule with its durations in steps."""
    return Schedule(
        kind=config.kind,
        peak_lr=peak,
        total_steps=total_steps,
        warmup_steps=epochs_to_steps(config.warmup_epochs, steps_per_epoch),
        warmup_kind=config.warmup_kind,
        warmup_start_factor=config.warmup_start_factor,
        milestones=tuple(epochs_to_steps(epoch, steps_per_epoch) for epoch in config.milestones),
        gamma=config.gamma,
        decay_steps=max(1, epochs_to_steps(config.decay_epochs, steps_per_epoch)),
        power=config.power,
        final_lr=config.final_lr,
    )
