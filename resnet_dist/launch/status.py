"""The state of a job: what SLURM says of it, how it ended, and which rank failed first."""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resnet_dist.text import printable_lines

NOT_ENDED = ("", "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")
"""States of a job that will run, runs, or will run again; empty where SLURM gave no answer."""

_POLL_SECONDS = 2.0
_LINES_OF_AN_ERROR = 40
_LINES_OF_A_LOG = 10


class BatchJob(Protocol):
    """A submitit job, as far as it is used here."""

    @property
    def job_id(self) -> str:
        """The job's id; of an element of an array, with its number (7_0)."""

    @property
    def num_tasks(self) -> int:
        """Number of ranks."""

    @property
    def state(self) -> str:
        """The state that submitit knows; true at once only for a local job."""


@dataclass(frozen=True)
class RankResult:
    """What submitit wrote for a rank that ended by itself.

    `kind` is "success" or "error", `value` what the rank returned or its traceback.
    """

    task: str
    kind: str
    value: object


def show_job(job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty if it does not answer or does not know the job."""
    command = ["scontrol", "-o", "show", "job", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def state_of(job: BatchJob) -> str:
    """The state of a submitit job in SLURM's words.

    A job that lost its node or was preempted, and that SLURM will start again, is PENDING.
    """
    is_local = hasattr(job, "_process")
    if is_local:
        return job.state
    shown = show_job(job.job_id)
    if not shown:
        return _state_in_accounting(job.job_id)
    state = shown["JobState"]
    if state in ("NODE_FAIL", "PREEMPTED") and shown["Requeue"] == "1":
        return "PENDING"
    return state


def _state_in_accounting(job_id: str) -> str:
    """The state of a job that ended so long ago that only SLURM's accounting remembers it."""
    command = ["sacct", "-XnPo", "State", "-j", job_id]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        words = done.stdout.split()
        if words:
            return words[0]
    return ""


def wait(jobs: Sequence[BatchJob], folder: Path) -> int:
    """Wait until all jobs have ended, print how each ended, and the error that came first.

    submitit's own `job.results()` is not used: it takes an error of one rank before a requeue, or
    the NODE_FAIL of a job that SLURM starts again, for the end of the job.

    Args:
        jobs: submitit's jobs.
        folder: The job's folder, which holds the results and the logs of the ranks.

    Returns:
        0 if every job succeeded, otherwise 1.
    """
    code = 0
    for job in jobs:
        last = _wait_for_end(job)
        results = read_results(folder, job.job_id)
        kinds = [result.kind for result in results]
        succeeded = last == "COMPLETED" or kinds == ["success"] * job.num_tasks
        outcome = "all ranks succeeded" if succeeded else "failed"
        print(f"job {job.job_id}: {last}, {outcome}", flush=True)
        if not succeeded:
            code = 1
            print(
                printable_lines(first_error(folder, job.job_id, results)),
                file=sys.stderr,
                flush=True,
            )
    return code


def _wait_for_end(job: BatchJob) -> str:
    """The final state of a job. It counts when SLURM says it twice: a busy controller errs."""
    before = ""
    while True:
        now = state_of(job)
        if now not in NOT_ENDED and now == before:
            return now
        before = now
        time.sleep(_POLL_SECONDS)


def read_results(folder: Path, job_id: str) -> list[RankResult]:
    """The results of a job's ranks, the oldest first."""
    paths = sorted(folder.glob(f"{job_id}_*_result.pkl"), key=os.path.getmtime)
    results = []
    for path in paths:
        task = path.name.split("_")[-2]
        kind, value = pickle.loads(path.read_bytes())
        results.append(RankResult(task, kind, value))
    return results


def first_error(folder: Path, job_id: str, results: list[RankResult]) -> str:
    """What the rank that failed first printed; without any, the end of every log."""
    logs = sorted(folder.glob(f"{job_id}_*log.out"), key=os.path.getmtime)
    failed = [result for result in results if result.kind == "error"]
    for result in failed:
        own = [path for path in logs if path.name.startswith(f"{job_id}_{result.task}_")]
        text = own[-1].read_text(errors="replace") if own else ""
        error = re.search(r"^error \(rank \d+\): .*", text, re.MULTILINE | re.DOTALL)
        if error:
            return "\n".join(error[0].splitlines()[:_LINES_OF_AN_ERROR])
    if failed:
        return f"task {failed[0].task}: {failed[0].value}"
    return "\n".join(_end_of_log(path) for path in logs)


def _end_of_log(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join([f"{path}:", *lines[-_LINES_OF_A_LOG:]])
