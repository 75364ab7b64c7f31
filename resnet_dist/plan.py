"""When a run logs, evaluates, saves and ends: the durations of the config, in steps."""

from dataclasses import dataclass

from resnet_dist.config import Config
from resnet_dist.schedule import epochs_to_steps


@dataclass(frozen=True)
class TrainPlan:
    """Durations in steps (optimizer updates)."""

    total_steps: int
    steps_per_epoch: int
    eval_interval_steps: int
    """0 = at the end only"""
    checkpoint_interval_steps: tuple[int, ...]
    """several intervals, each of which makes a checkpoint due; 0 = never"""
    log_interval_steps: int
    max_nonfinite_steps: int


def build_plan(config: Config, steps_per_epoch: int) -> TrainPlan:
    """Convert the durations of a config to steps.

    Args:
        config: The config of the run; its durations are in epochs.
        steps_per_epoch: Number of updates of one epoch.
    """
    train = config.train
    return TrainPlan(
        total_steps=max(1, epochs_to_steps(train.epochs, steps_per_epoch)),
        steps_per_epoch=steps_per_epoch,
        eval_interval_steps=_interval(train.eval_interval_epochs, steps_per_epoch),
        checkpoint_interval_steps=(
            _interval(config.checkpoint.interval_epochs, steps_per_epoch),
            config.checkpoint.interval_steps,
        ),
        log_interval_steps=config.log.interval_steps,
        max_nonfinite_steps=train.max_nonfinite_steps,
    )


def _interval(epochs: float, steps_per_epoch: int) -> int:
    """An interval in steps: at least 1, but 0 (never) stays 0."""
    if not epochs:
        return 0
    return max(1, epochs_to_steps(epochs, steps_per_epoch))


def is_due(step: int, interval: int, total_steps: int) -> bool:
    """Whether something is due after `step` updates.

    Args:
        step: Number of updates done.
        interval: Steps from one time to the next; 0 = at the end only.
        total_steps: Number of updates of the run, after which everything is due.
    """
    if step == total_steps:
        return True
    return step > 0 and interval > 0 and step % interval == 0


@dataclass(frozen=True)
class Due:
    """What is due at the present step."""

    log: bool
    evaluation: bool
    checkpoint: bool

    @staticmethod
    def at(step: int, plan: TrainPlan) -> "Due":
        """What is due after `step` updates."""
        total_steps = plan.total_steps
        saves = False
        for interval in plan.checkpoint_interval_steps:
            if is_due(step, interval, total_steps):
                saves = True
        return Due(
            log=is_due(step, plan.log_interval_steps, total_steps),
            evaluation=is_due(step, plan.eval_interval_steps, total_steps),
            checkpoint=saves,
        )

    @property
    def any(self) -> bool:
        """Whether the loop waits for the device at this step anyway."""
        return self.log or self.evaluation or self.checkpoint
