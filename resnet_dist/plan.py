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
    """The plan of a run whose epochs have `steps_per_epoch` steps."""
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
    """Whether something that happens every `interval` steps (0 = never) and at the end is due after
    `step` updates.
    """
    if step == total_steps:
        return True
    return step > 0 and interval > 0 and step % interval == 0
