"""What all benchmarks of the training loop share: the parts of a run, a step, and its timing."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from resnet_dist import engine
from resnet_dist.checkpoints.state import build_state, wrap_ddp
from resnet_dist.commands.device_rates import synchronize
from resnet_dist.compilation import refusal, start_compiler
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.types import Batch
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.engine import Training
from resnet_dist.nonfinite import NonFinite
from resnet_dist.plan import build_plan
from resnet_dist.run import build_update_rule, first_shape
from resnet_dist.schedule import build_schedule
from resnet_dist.teacher import load_teacher

NEVER = 10**9
"""more steps than a benchmark does"""

Step = Callable[[], None]
"""does one update; it need not wait for the device"""

_LEARNING_RATE = 1e-4


class NoValLoader:
    """The place of the validation set in a run that never evaluates."""

    num_samples = 0
    class_names: tuple[str, ...] = ()
    num_bad = 0
    rounds = 0
    mirrored = False

    def __iter__(self) -> Iterator[Batch | None]:
        """Never called."""
        raise AssertionError("a benchmark does not evaluate")

    def remarks(self) -> list[str]:
        """Nothing to say."""
        return []

    def close(self) -> None:
        """Nothing to close."""


def build_training(config: Config, runtime: Runtime, interval: int) -> Training:
    """The parts of a run that logs every `interval` steps and neither evaluates nor saves."""
    loader = build_train_loader(config, runtime, cached=True)
    plan = replace(
        build_plan(config, loader.steps_per_epoch),
        eval_interval_steps=0,
        checkpoint_interval_steps=(0,),
        log_interval_steps=interval,
        max_nonfinite_steps=NEVER,
    )
    state = build_state(config, len(loader.class_names), runtime.device)
    teacher = load_teacher(config, loader.class_names, runtime)
    rule = build_update_rule(config, runtime.device, runtime.rank, runtime.world_size, teacher)
    shape = first_shape(config, 0, runtime)
    compiler = None
    if config.train.compile is True:
        teacher_network = None if teacher is None else teacher.network
        compiler, problem = start_compiler(
            state.model, config.train, shape, runtime, teacher_network
        )
        if problem:
            raise ValueError(refusal(problem))
    model = wrap_ddp(state.model, runtime.device)
    engine.warm_up_ddp(model, shape, rule.precision, rule.replays_graphs)
    return Training(
        model=model,
        state=state,
        train_loader=loader,
        val_loader=NoValLoader(),
        schedule=build_schedule(config.schedule, _LEARNING_RATE, plan.steps_per_epoch, NEVER),
        rule=rule,
        plan=plan,
        compiler=compiler,
    )


def step_on_one_batch(parts: Training) -> Step:
    """The project's whole update, `engine.train_step`, on the first batch of the loader.

    Args:
        parts: The parts of the run. The loader is read once.
    """
    batches = parts.train_loader.batches(0, 1)
    micro_batches = list(batches)
    nonfinite = NonFinite(parts.state.model, parts.state.step)

    def step() -> None:
        engine.train_step(
            parts.model, parts.state, micro_batches, _LEARNING_RATE, parts.rule, nonfinite
        )

    return step


def time_in_turns(
    steps: Mapping[str, Step], device: torch.device, windows: int, length: int
) -> dict[str, list[float]]:
    """Time several steps in turns, since the speed of a machine changes.

    Args:
        steps: What is compared, by name.
        device: The device that they run on.
        windows: Number of turns of each.
        length: Steps of a turn, after three that do not count.

    Returns:
        The seconds of a step in each turn, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(windows):
        for name, step in steps.items():
            seconds[name].append(time_steps(step, device, length))
    return seconds


def time_steps(step: Step, device: torch.device, length: int) -> float:
    """The mean seconds of `length` steps, after three that do not count."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(length):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / length


def host_seconds(step: Step, device: torch.device, repeats: int = 10) -> float | None:
    """The time that the host needs to start all work of a step; None on a CPU, which does the work.

    Each step starts on an idle device, so that the host never waits for room in the queue of
    kernels.
    """
    if device.type != "cuda":
        return None
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(seconds)


def split_names(text: str) -> list[str]:
    """The words between the commas of a text."""
    words = [word.strip() for word in text.split(",")]
    return [word for word in words if word]
