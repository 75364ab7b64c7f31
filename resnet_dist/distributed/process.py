"""Run one process (one rank): join the other ranks, do the work, and leave with an exit code.

Exit codes:

- 0: success
- 1: an unexpected error, printed with its traceback
- 2: an error that the user can correct, printed as a sentence
- `EXIT_LOST_RANK`: another rank or the launcher was lost, or the start is out of date: start again
- 128 + number: a signal, after which the training has saved a checkpoint
"""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from resnet_dist.config import Config
from resnet_dist.distributed import runtime as distributed
from resnet_dist.distributed.error_file import write_error_file
from resnet_dist.distributed.rendezvous import Launcher, LostRankError, read_launcher
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.distributed.watchdog import EXIT_LOST_RANK, Watchdog
from resnet_dist.layout import describe_layout, fit_layout
from resnet_dist.logs import decoder_warnings
from resnet_dist.precision import resolve_settings
from resnet_dist.text import printable

_BATCH_OF_ONE = (
    "batch norm cannot train on a single value per channel: a rank and micro-step has one image "
    "(train.global_batch_size / (ranks * train.grad_accum_steps) = 1); make it at least 2"
)

# Time between two looks of a spare rank at the state of the others.
_SPARE_SECONDS = 0.5


class StartAgainError(RuntimeError):
    """What this run starts from is no longer the newest state; the same command finds that."""


ErrorTranslator = Callable[[Exception], Exception]


def as_it_is(problem: Exception) -> Exception:
    """An error that needs no other words."""
    return problem


def run_process(
    config: Config, body: Callable[[Config, Runtime], int], resolve_auto: bool = True
) -> int:
    """Join the other ranks, call `body(config, runtime)`, and leave the process group.

    Args:
        config: The config.
        body: The work. It gets the config with `train.precision` resolved for the device, and
            returns the exit code.
        resolve_auto: Whether `train.precision` is resolved here. Training resolves it itself, once
            it knows the checkpoint that it resumes from.

    Returns:
        The exit code: that of `body`, or that of `report_failure` if `body` raises.
    """
    section = config.distributed
    try:
        launcher = read_launcher()
        may_spare = launcher.restarts and not resolve_auto
        layout = fit_layout(config.train, launcher.world_size, may_spare, _mixes_pairs(config))
        watchdog = distributed.join_ranks(launcher, section.timeout_s, layout.ranks)
    except (ValueError, LostRankError) as problem:
        return _report_early(problem)
    if launcher.rank >= layout.ranks:
        return _wait_as_spare(watchdog)
    if launcher.rank == 0 and not resolve_auto:
        for sentence in describe_layout(config.train, launcher.world_size, layout):
            print(sentence, flush=True)
    config = _with_micro_steps(config, layout.grad_accum_steps)
    try:
        runtime = distributed.start(section.device, section.timeout_s, section.threads, watchdog)
        if resolve_auto:
            config = resolve_settings(config, runtime.device)
        with decoder_warnings.collected():
            code = body(config, runtime)
    except Exception as problem:
        code = _report(problem, watchdog)
    return _leave(code, watchdog)


def _leave(code: int, watchdog: Watchdog) -> int:
    """Leave the other ranks.

    Returns:
        The exit code of this process: `code`, or `EXIT_LOST_RANK` if the training was stopped
        since the store or the launcher was lost.
    """
    if watchdog.lost_server and code == 128 + signal.SIGTERM:
        # No process sent this signal: the watchdog asked the training to stop.
        code = EXIT_LOST_RANK
    if code in (1, 2, EXIT_LOST_RANK) and watchdog.world_size > 1:
        # The other ranks may never reach a common end.
        if watchdog.is_watching and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # NCCL's destructors may wait for a rank that is lost.
            watchdog.exit_now(code)
        return code
    watchdog.tell_spares(code)
    if code >= 128:
        name = signal.Signals(code - 128).name
        command = resume_command(watchdog.launcher)
        write_error_file(f"stopped by {name}; resume with: {command}")
    distributed.leave_ranks(watchdog)
    return code


def _mixes_pairs(config: Config) -> bool:
    """Whether images are mixed in pairs, so that the local batch size must be even."""
    augment = config.augment
    return augment.mixup_alpha > 0 or augment.cutmix_alpha > 0


def _with_micro_steps(config: Config, steps: int) -> Config:
    train = replace(config.train, grad_accum_steps=steps)
    return replace(config, train=train)


def _wait_as_spare(watchdog: Watchdog) -> int:
    """Wait until the ranks that train have ended, and return their exit code.

    If one of them fails, the launcher ends this process, too, and starts all of them again.
    """
    while True:
        code = watchdog.code_of_the_others()
        if code is not None:
            return code
        time.sleep(_SPARE_SECONDS)


def _report_early(problem: Exception) -> int:
    """Print why the ranks could not join each other, and return the exit code.

    An error that all ranks have in common is printed by rank 0 alone.
    """
    text = printable(problem)
    rank = os.environ.get("RANK", "")
    write_error_file(str(problem))
    if not isinstance(problem, ValueError):
        print(f"error (rank {rank}): {text}", file=sys.stderr, flush=True)
        return EXIT_LOST_RANK
    task = os.environ.get("SLURM_PROCID", "0")
    if rank in ("", "0") and task == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)
    return 2


def report_failure(problem: Exception, runtime: Runtime) -> int:
    """Print the error that ended this rank, and publish it for the other ranks.

    - An error that the user can correct is printed as a sentence.
    - A collective that failed is traced to the rank that caused it.
    - Any other error is printed with its traceback.

    Args:
        problem: The error.
        runtime: This rank, with its watchdog.

    Returns:
        The exit code: 2, the code of the rank that failed first or `EXIT_LOST_RANK`, or 1.
    """
    assert runtime.watchdog is not None
    return _report(problem, runtime.watchdog)


@contextlib.contextmanager
def failures_reported_first(
    runtime: Runtime, translate_error: ErrorTranslator = as_it_is
) -> Iterator[None]:
    """Print the error of a block before its resources are closed, and raise it again.

    Closing a loader may wait for a device that waits for a lost rank. An error that the user can
    correct is not printed: the caller does it, and may add to the message.

    Args:
        runtime: This rank, with its watchdog.
        translate_error: From an error to the one that is printed in its place.
    """
    try:
        yield
    except (ValueError, FloatingPointError):
        raise
    except Exception as problem:
        report_failure(translate_error(problem), runtime)
        raise


def _report(problem: Exception, watchdog: Watchdog) -> int:
    """See `report_failure`."""
    text = printable(problem)
    if "Expected more than 1 value per channel" in text:
        failure = watchdog.own(f"{_BATCH_OF_ONE} ({text})", 2)
        return watchdog.fail(failure)
    if isinstance(problem, StartAgainError):
        failure = watchdog.own(text, EXIT_LOST_RANK)
        return watchdog.fail(failure)
    if isinstance(problem, (ValueError, FloatingPointError)):
        failure = watchdog.own(text, 2)
        return watchdog.fail(failure)
    if isinstance(problem, torch.OutOfMemoryError):
        failure = watchdog.own(f"out of GPU memory, with this batch size: {text}", 2)
        return watchdog.fail(failure)
    if _is_of_a_collective(problem):
        failure = watchdog.find_cause(problem)
        return watchdog.fail(failure)
    kind = type(problem).__name__
    failure = watchdog.own(f"{kind}: {text}")
    trace = traceback.format_exception(problem)
    return watchdog.fail(failure, "".join(trace))


def _is_of_a_collective(problem: Exception) -> bool:
    """Whether another rank may be the cause of the error."""
    if isinstance(problem, (LostRankError, torch.distributed.DistError)):
        return True
    # gloo raises a plain RuntimeError with the path of its source file.
    return "/gloo/" in str(problem)


def resume_command(place: Runtime | Launcher) -> str:
    """Return the shell command that started this run; the same command resumes it.

    Args:
        place: Says how many ranks the run has, in all and on this machine.
    """
    # A launcher other than torchrun sets this variable.
    if "RESNET_DIST_RESUME" in os.environ:
        return os.environ["RESNET_DIST_RESUME"]
    arguments = shlex.join(sys.argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"{_program('python')} {arguments}"
    if place.world_size > place.local_world_size:
        return f"the same torchrun command on each of the nodes, with {arguments}"
    torchrun = _program("torchrun")
    return f"{torchrun} --standalone --nproc_per_node {place.local_world_size} {arguments}"


def _program(name: str) -> str:
    """Return a program of this Python's environment as the user's shell finds it."""
    folder = os.path.dirname(sys.executable)
    own = os.path.join(folder, name)
    if shutil.which(name) == own:
        return name
    if own.startswith(os.getcwd()):
        return os.path.relpath(own)
    return own
