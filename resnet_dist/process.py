"""The life of one process (one rank): join the others, do the work, leave with the right exit code.

Exit codes: 0 is success, 1 an unexpected error (with its traceback), 2 an error that the user can
mend (in a sentence), `EXIT_LOST_RANK` a lost rank, 128 + number a signal after its checkpoint.
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

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.distributed import Runtime
from resnet_dist.layout import describe_layout, fit_layout
from resnet_dist.precision import resolve_settings
from resnet_dist.rendezvous import Launcher, LostRankError, read_launcher
from resnet_dist.text import printable
from resnet_dist.watchdog import EXIT_LOST_RANK, Watchdog, write_error_file

_BATCH_OF_ONE = (
    "batch norm cannot train on a single value per channel: a rank and micro-step has one image "
    "(train.global_batch_size / (ranks * train.grad_accum_steps) = 1); make it at least 2"
)

_SPARE_SECONDS = 0.5
"""How often a rank that waits as a spare looks whether the others are done."""


def run_process(
    config: Config, body: Callable[[Config, Runtime], int], resolve_auto: bool = True
) -> int:
    """Join the other ranks, call `body(config, runtime)`, and leave the process group.

    `body` gets the config with `train.precision` resolved for the device, unless `resolve_auto` is
    false: training resolves it itself, once it knows the checkpoint that it resumes from. Returns
    the exit code: the body's, or the one of `report_failure` if it raises.
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
        code = body(config, runtime)
    except Exception as problem:
        code = _report(problem, watchdog)
    return _leave(code, watchdog)


def _leave(code: int, watchdog: Watchdog) -> int:
    """Leave the other ranks; returns the exit code that the launcher is to see."""
    if watchdog.lost_server and code == 128 + signal.SIGTERM:
        code = EXIT_LOST_RANK  # nobody sent a signal: the watchdog asked for the end
    if code in (1, 2, EXIT_LOST_RANK):
        # The other ranks may never come to a common end.
        if watchdog.is_watching and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            watchdog.exit_now(code)  # NCCL's destructors may wait for a rank that is lost
        return code
    watchdog.tell_spares(code)
    if code >= 128:
        name = signal.Signals(code - 128).name
        write_error_file(f"stopped by {name}; resume with: {resume_command(watchdog.launcher)}")
    distributed.leave_ranks(watchdog)
    return code


def _mixes_pairs(config: Config) -> bool:
    return config.augment.mixup_alpha > 0 or config.augment.cutmix_alpha > 0


def _with_micro_steps(config: Config, steps: int) -> Config:
    train = replace(config.train, grad_accum_steps=steps)
    return replace(config, train=train)


def _wait_as_spare(watchdog: Watchdog) -> int:
    """Do nothing until the ranks that train are done; returns their exit code.

    When one of them fails, the launcher ends this process too, and starts all of them again.
    """
    while True:
        code = watchdog.code_of_the_others()
        if code is not None:
            return code
        time.sleep(_SPARE_SECONDS)


def _report_early(problem: Exception) -> int:
    """Print why the ranks could not meet, once where that is possible; returns the exit code."""
    code = 2 if isinstance(problem, ValueError) else EXIT_LOST_RANK
    rank = os.environ.get("RANK", "")
    if code == EXIT_LOST_RANK:
        print(f"error (rank {rank}): {printable(problem)}", file=sys.stderr, flush=True)
    elif rank in ("", "0") and os.environ.get("SLURM_PROCID", "0") == "0":
        print(f"error: {printable(problem)}", file=sys.stderr, flush=True)
    write_error_file(str(problem))
    return code


def report_failure(problem: Exception, runtime: Runtime) -> int:
    """Print what ended this rank, and return the exit code.

    An error that the user can mend is printed as a sentence (code 2). A collective that failed is
    traced to the rank that caused it (that rank's code, or `EXIT_LOST_RANK`). Anything else is
    printed with its traceback (code 1).
    """
    assert runtime.watchdog is not None
    return _report(problem, runtime.watchdog)


@contextlib.contextmanager
def failures_reported_first(runtime: Runtime) -> Iterator[None]:
    """Print what ended this rank before anything is closed.

    To close a loader may mean to wait for a device that waits for a lost rank. What the user can
    mend is left to the caller, who may add to it.
    """
    try:
        yield
    except (ValueError, FloatingPointError):
        raise
    except Exception as problem:
        report_failure(problem, runtime)
        raise


def _report(problem: Exception, watchdog: Watchdog) -> int:
    text = printable(problem)
    if "Expected more than 1 value per channel" in text:
        failure = watchdog.own(f"{_BATCH_OF_ONE} ({text})", 2)
        return watchdog.fail(failure)
    if isinstance(problem, (ValueError, FloatingPointError)):
        failure = watchdog.own(text, 2)
        return watchdog.fail(failure)
    if _is_of_a_collective(problem):
        failure = watchdog.find_cause(problem)
        return watchdog.fail(failure)
    kind = type(problem).__name__
    failure = watchdog.own(f"{kind}: {text}")
    trace = traceback.format_exception(problem)
    return watchdog.fail(failure, "".join(trace))


def _is_of_a_collective(problem: Exception) -> bool:
    """Whether another rank may be the cause."""
    lost = (LostRankError, torch.distributed.DistError)
    return isinstance(problem, lost) or "/gloo/" in str(problem)


def resume_command(place: Runtime | Launcher) -> str:
    """The shell command that started this run; the same command resumes it."""
    if "RESNET_DIST_RESUME" in os.environ:  # set by a launcher other than torchrun
        return os.environ["RESNET_DIST_RESUME"]
    arguments = shlex.join(sys.argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"{_program('python')} {arguments}"
    if place.world_size > place.local_world_size:
        return f"the same torchrun command on each of the nodes, with {arguments}"
    torchrun = _program("torchrun")
    return f"{torchrun} --standalone --nproc_per_node {place.local_world_size} {arguments}"


def _program(name: str) -> str:
    """How the user's shell finds a program of this Python's environment."""
    own = os.path.join(os.path.dirname(sys.executable), name)
    if shutil.which(name) == own:
        return name
    if own.startswith(os.getcwd()):
        return os.path.relpath(own)
    return own
