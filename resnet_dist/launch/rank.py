"""What each rank of a job runs, and how it ends.

SLURM starts every rank as a task of its own. It depends on the cluster which process gets a signal,
so a signal only sets a flag (`distributed.StopSignal`). After the checkpoint that follows, the main
rank asks SLURM what the signal meant. submitit's own handler, which saves inside the signal
handler, would meet a half updated model; it is not used.

How a rank ends decides what happens to the job (`end_rank`): the batch script starts it again
unless a rank left a result (see `script`).
"""

import contextlib
import functools
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from resnet_dist.config import Config
from resnet_dist.launch.status import show_job
from resnet_dist.text import printable

if TYPE_CHECKING:
    from resnet_dist.distributed.runtime import Runtime

Verdict = Literal["requeue", "go on", "wait", "stop"]
"""What follows a signal and its checkpoint. wait: SLURM ends the job, and decides what then."""

_FIRST_PORT = 20000
# Linux takes the ports of outgoing connections from here on.
_END_OF_PORTS = 32768
# Exit codes from here on are 128 plus the number of a signal.
_SIGNAL_CODES = 128


class Place(Protocol):
    """submitit's JobEnvironment, as far as it is used here: where in the job this rank is."""

    @property
    def job_id(self) -> str:
        """The job's id; of an element of an array, with its number (7_0)."""

    @property
    def global_rank(self) -> int:
        """This rank."""

    @property
    def num_tasks(self) -> int:
        """Number of ranks."""

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""

    @property
    def hostnames(self) -> Sequence[str]:
        """The names of the nodes."""

    def name(self) -> str:
        """The name of the executor: slurm or local."""


@dataclass(frozen=True)
class RankTask:
    """The function that submitit pickles and calls on each rank, again in each attempt of the job.

    `code` is the folder that resnet_dist must be imported from, `folder` the one that relative
    paths start from, `command` what the user typed.
    """

    config: Config
    max_requeues: int
    code: str
    folder: str
    command: str

    def __call__(self) -> None:
        """Train as one rank.

        Returns when the training has finished. A rank of a job that is requeued does not return.

        Raises:
            RuntimeError: The training failed by itself: the same again would fail again.
        """
        import submitit

        job: Place = submitit.JobEnvironment()
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        _hold_back_usr2()
        os.chdir(self.folder)
        self._check_start(attempt)
        self._set_environment(job)
        hosts = " ".join(job.hostnames)
        print(
            f"attempt {attempt}, rank {job.global_rank} of {job.num_tasks} on {hosts}", flush=True
        )
        if job.global_rank == 0 and _is_slurm(job) and not show_job(job.job_id):
            print(
                "warning: scontrol does not answer here (a container?): after a SIGTERM the run"
                " saves and goes on, since nothing says what the signal meant",
                flush=True,
            )

        from resnet_dist.distributed.process import run_process

        signals = SignalJudge(job.job_id)
        body = functools.partial(preflight_and_train, should_continue=signals.should_continue)
        code = run_process(self.config, body, resolve_auto=False)
        end_rank(code, signals.verdict, job, attempt, self.max_requeues)

    def _check_start(self, attempt: int) -> None:
        """Refuse another copy of the package, and a requeue too many."""
        package = Path(__file__).resolve().parents[1]
        if self.code != str(package.parent):
            raise RuntimeError(
                f"resnet_dist was imported from {package.parent}, not from {self.code}: "
                "look at cluster.setup and at PYTHONPATH"
            )
        if attempt > self.max_requeues:
            raise RuntimeError(
                f"requeued {attempt} times: cluster.max_requeues is {self.max_requeues}"
            )

    def _set_environment(self, job: Place) -> None:
        """Set what torch.distributed reads, from SLURM's variables."""
        import submitit

        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if job.num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["RESNET_DIST_RESUME"] = self.command


class SignalJudge:
    """Decides on the main rank what a signal meant, and remembers it for the end of the rank."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.verdict: Verdict | None = None

    def should_continue(self, number: int) -> bool:
        """Whether the training goes on after signal `number` and its checkpoint."""
        self.verdict = judge_signal(number, show_job(self.job_id))
        print(f"{signal.Signals(number).name}, checkpoint, {self.verdict}", flush=True)
        return self.verdict == "go on"


def judge_signal(number: int, job: dict[str, str]) -> Verdict:
    """What follows signal `number` and its checkpoint, by what SLURM says of the job.

    SIGUSR1 and SIGUSR2 come before a time limit, or from a user who wants a requeue. SIGTERM alone
    is ambiguous. A running job in the grace period of a preemption is requeued. A running job
    without one got a stray signal and goes on. A job that no longer runs was cancelled or is being
    requeued: a second requeue would bring a cancelled job back to life. Without an answer from
    SLURM the training goes on: whoever wants its end will end it.

    Args:
        number: The signal.
        job: The fields of `show_job`.
    """
    if number in (signal.SIGUSR1, signal.SIGUSR2):
        return "requeue"
    if number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ:
        return "stop"
    if job.get("JobState", "RUNNING") != "RUNNING":
        return "wait"
    preempted = job.get("PreemptTime", "None")
    # A preemption of an earlier attempt came before this attempt's start.
    is_preempted = preempted[:1].isdigit() and preempted >= job.get("StartTime", "")
    return "requeue" if is_preempted else "go on"


def end_rank(
    code: int, verdict: Verdict | None, job: Place, attempt: int, max_requeues: int
) -> None:
    """End this rank so that the batch script, or a client that waits, sees what happened.

    | the training                                  | this rank                    | the job       |
    |-----------------------------------------------|------------------------------|---------------|
    | finished (0)                                  | returns: a result            | COMPLETED     |
    | failed by itself, or was stopped by its user  | raises: a result             | FAILED        |
    | lost another rank                             | exits with the code          | is requeued   |
    | saved after a signal (128 + signal)           | exits with the code          | is requeued   |

    On SLURM a requeue happens only while the job runs, so a cancelled job stays cancelled.

    Args:
        code: The exit code of the training.
        verdict: What the last signal meant; None without one, and on all ranks but the main one.
        job: submitit's JobEnvironment.
        attempt: Number of requeues so far.
        max_requeues: Number of requeues that are allowed.

    Raises:
        RuntimeError: The training failed, or may not be requeued.
    """
    from resnet_dist.distributed.watchdog import EXIT_LOST_RANK

    if code == 0:
        return
    was_lost = code == EXIT_LOST_RANK and _is_slurm(job)
    saved = code >= _SIGNAL_CODES and verdict != "stop"
    if not was_lost and not saved:
        raise RuntimeError(f"rank {job.global_rank} ended with code {code}, see its log")
    if verdict == "requeue" and attempt >= max_requeues:
        raise RuntimeError(
            f"not requeued: cluster.max_requeues is {max_requeues}; submit again to go on"
        )
    if not _is_slurm(job):
        sys.exit(code)
    if saved and job.global_rank != 0:
        _wait_to_be_ended()
    sys.stdout.flush()
    # No return and no exception: submitit must not write a result.
    os._exit(code)


def _wait_to_be_ended() -> None:
    """Sleep until the main rank has ended, when srun ends the others (--kill-on-bad-exit).

    The main rank may still be writing its checkpoint, and would be ended by an exit of this one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        time.sleep(60)


def _is_slurm(job: Place) -> bool:
    return job.name() == "slurm"


def _hold_back_usr2() -> None:
    """Block SIGUSR2, whose default would end the process; `StopSignal` lets it in.

    submitit's handler is replaced too, since a thread of a library may not block the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.signal(signal.SIGUSR2, _ignore)


def _ignore(number: int, frame: object) -> None:
    """A handler that does nothing. SIG_IGN would be inherited by child processes."""


def preflight_and_train(
    config: Config, runtime: "Runtime", should_continue: Callable[[int], bool]
) -> int:
    """Do the quick checks of `resnet-dist doctor`, then train: mistakes cost a minute, not a night.

    Raises:
        ValueError: A check failed.
    """
    from resnet_dist import run
    from resnet_dist.commands import doctor

    results = doctor.quick(config, runtime)
    if runtime.is_main:
        for result in results:
            text = printable(result.text)
            print(f"preflight: {result.level}, {result.check}: {text}", flush=True)
    errors = [result.text for result in results if result.level == "error"]
    if errors:
        raise ValueError("; ".join(errors))
    return run.train(config, runtime, should_continue)


def free_port(job_id: str, attempt: str) -> int:
    """A free TCP port of this node, from a sequence of its own for each job and attempt.

    Two jobs do not meet on a port, nor does a job meet a leftover process of its last attempt.
    """
    ports = random.Random(f"{job_id}/{attempt}")
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", ports.randrange(_FIRST_PORT, _END_OF_PORTS)))
            return int(probe.getsockname()[1])
