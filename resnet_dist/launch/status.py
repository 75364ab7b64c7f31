"""The state of a job: SLURM's word for it, how the job ended, and which rank failed first."""

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
    """The members of a submitit job that are used here."""

    @property
    def job_id(self) -> str:
        """The id of the job; an element of an array has its number, too (7_0)."""

    @property
    def num_tasks(self) -> int:
        """Number of ranks."""

    @property
    def state(self) -> str:
        """The state that submitit knows; only for a local job it is up to date."""


@dataclass(frozen=True)
class RankResult:
    """The result that submitit has written for a rank that ended by itself.

    Attributes:
        task: Number of the rank, as text.
        kind: "success" or "error".
        value: What the rank returned, or its traceback.
    """

    task: str
    kind: str
    value: object


def show_job(job_id: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`.

    The result is empty if the command does not answer or does not know the job.
    """
    command = ["scontrol", "-o", "show", "job", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    fields = re.findall(r"(\w+)=(\S*)", done.stdout)
    return dict(fields)


def find_queued_job(output_dir: Path) -> str:
    """The id of a job of `resnet-dist submit` that SLURM still has for this output_dir; "" if none.

    Jobs of an array keep their files in the folder that their trainings share: they are not found.
    """
    for path in sorted(output_dir.glob("job_*/*_submitted.pkl")):
        job_id = path.name.removesuffix("_submitted.pkl")
        state = show_job(job_id).get("JobState", "")
        if state and state in NOT_ENDED:
            return job_id
    return ""


def state_of(job: BatchJob) -> str:
    """Return the state of a submitit job, in SLURM's terms.

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
    """Return the state of a job that has ended so long ago that only the accounting has it."""
    command = ["sacct", "-XnPo", "State", "-j", job_id]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        words = done.stdout.split()
        if words:
            return words[0]
    return ""


def wait(jobs: Sequence[BatchJob], folder: Path) -> int:
    """Wait until all jobs have ended, and print how each ended, with its first error.

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
        if succeeded:
            print(f"job {job.job_id}: {last}, all ranks succeeded", flush=True)
            continue
        print(f"job {job.job_id}: {last}, failed", flush=True)
        error = first_error(folder, job.job_id, results)
        print(printable_lines(error), file=sys.stderr, flush=True)
        code = 1
    return code


def _wait_for_end(job: BatchJob) -> str:
    """Wait for the end of a job, and return its final state.

    The state must be read twice, since a busy SLURM controller may give a wrong one.
    """
    before = ""
    while True:
        now = state_of(job)
        if now not in NOT_ENDED and now == before:
            return now
        before = now
        time.sleep(_POLL_SECONDS)


def read_results(folder: Path, job_id: str) -> list[RankResult]:
    """Read the results of the ranks of a job, the oldest first."""
    paths = sorted(folder.glob(f"{job_id}_*_result.pkl"), key=os.path.getmtime)
    results = []
    for path in paths:
        task = path.name.split("_")[-2]
        kind, value = pickle.loads(path.read_bytes())
        results.append(RankResult(task, kind, value))
    return results


def first_error(folder: Path, job_id: str, results: list[RankResult]) -> str:
    """Find the error that came first.

    Args:
        folder: The folder of the job, with the logs of its ranks.
        job_id: The id of the job.
        results: The results of its ranks, the oldest first.

    Returns:
        The error that a rank has printed; without one, the traceback of the first rank that has
        failed; without one, the end of every log.
    """
    logs = sorted(folder.glob(f"{job_id}_*log.out"), key=os.path.getmtime)
    failed = [result for result in results if result.kind == "error"]
    for result in failed:
        beginning = f"{job_id}_{result.task}_"
        own = [path for path in logs if path.name.startswith(beginning)]
        if not own:
            continue
        error = _printed_error(own[-1])
        if error:
            return error
    if failed:
        first = failed[0]
        return f"task {first.task}: {first.value}"
    ends = [_end_of_log(path) for path in logs]
    return "\n".join(ends)


def _printed_error(log: Path) -> str:
    """Return the error message in a log, with the lines that follow it; empty if there is none."""
    text = log.read_text(errors="replace")
    found = re.search(r"^error \(rank \d+\): .*", text, re.MULTILINE | re.DOTALL)
    if not found:
        return ""
    lines = found[0].splitlines()
    return "\n".join(lines[:_LINES_OF_AN_ERROR])


def _end_of_log(path: Path) -> str:
    """Return the last lines of a log, after its path."""
    lines = path.read_text(errors="replace").splitlines()
    last = lines[-_LINES_OF_A_LOG:]
    return "\n".join([f"{path}:", *last])
