"""Trainings on a real SLURM cluster, and what may happen to them there. `pytest -rP` shows what
each event cost.

A scenario waits for most of its time. So four are played at once, each on nodes of its own where it
has to be, and a test waits for one of them. The cluster has six nodes, n1 to n6.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import submitit
import torch
from dist_utils import CLOCK_KEYS, options, run_app, small_run

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.launch import status

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 24
SUBMITTING = threading.Lock()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(str(folder))
    return folder


def training(digits, output_dir):
    """Twelve steps an epoch, each step logged, a checkpoint every five steps and at each epoch. The
    network is small: many ranks share the machine, and SLURM does not see which one they train.
    """
    return small_run(
        data__data_dir=digits,
        output_dir=output_dir,
        model__name="lenet5",
        data__train_crop_size=32,
        data__val_resize_size=32,
        data__val_crop_size=32,
        train__epochs=2,
        train__ema_decay=0.9,
        checkpoint__interval_steps=5,
    )


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """Runs without SLURM and without trouble, by the number of ranks."""
    folders = {}
    for world_size in (2, 4):
        folder = folders[world_size] = tmp_path_factory.mktemp("undisturbed")
        assert (
            run_app(world_size, ["train", *training(digits, folder)], str(folder / "log"))
            == [0] * world_size
        )
    return folders


@dataclass
class Place:
    """What a scenario needs: the cluster's folder, the data, the undisturbed runs, and a folder of
    its own.
    """

    cluster: Path | None
    digits: Path
    undisturbed: dict
    folder: Path


class Job:
    """A submitted training: two ranks on one node with fake GPUs, unless `more` says something
    else.
    """

    def __init__(self, place, *more, seconds="0.3", setup=(), ranks=2):
        self.place, self.output_dir, self.started = place, place.folder, time.monotonic()
        lines = [f"export PYTHONPATH={HERE / 'slow'}", f"export SLOW_SECONDS={seconds}", *setup]
        arguments = [
            *training(place.digits, self.output_dir),
            *[f"--cluster.setup+={line}" for line in lines],
            "--cluster.time_min",
            "30",
            "--cluster.gpus_per_node",
            "2",
            *more,
        ]
        with SUBMITTING:
            assert cli.main(["submit", *arguments]) == 0
        self.folder = next(self.output_dir.glob("job_*"))
        self.id = next(self.folder.glob("*_submitted.pkl")).name.split("_")[0]
        self.job = submitit.SlurmJob(self.folder, self.id, tasks=range(ranks))

    def log(self, attempt, task=0):
        path = self.folder / f"{self.id}_{task}_attempt{attempt}_log.out"
        return path.read_text() if path.exists() else ""

    def logged(self, attempt=0):
        """The steps that an attempt has logged."""
        return [
            int(step) for step in re.findall(rf"step +(\d+)/{STEPS} .* train ", self.log(attempt))
        ]

    def wait_until(self, condition):
        wait_for(
            condition, lambda: "\n".join(path.read_text() for path in self.folder.glob("*log.out"))
        )

    def wait_for_step(self, step, attempt=0):
        self.wait_until(lambda: (self.logged(attempt) or [-1])[-1] >= step)

    def finish(self):
        """The exit code of the client that waits."""
        self.wait_until(lambda: status.state_of(self.job) not in status.NOT_ENDED)
        return status.wait([self.job], self.folder)

    def check(self, attempts=2, at_most=0, lost=0):
        """It finished with the undisturbed run's weights and metrics, in so many attempts; says
        what that cost.
        """
        assert self.finish() == 0, status.show_job(self.id)
        restarts = int(status.show_job(self.id)["Restarts"])
        assert attempts - 1 <= restarts <= max(attempts, at_most) - 1
        attempts = restarts + 1
        starts = [
            int(re.search(r"; step (\d+), from", self.log(k)).group(1)) for k in range(attempts)
        ]
        redone = [
            (self.logged(k) or starts[k : k + 1])[-1] - starts[k + 1] for k in range(attempts - 1)
        ]
        assert max(redone, default=0) <= lost
        assert_same_run(self.output_dir, self.place.undisturbed[2])
        seconds = time.monotonic() - self.started
        return f"resumed at {starts[1:]}, steps lost {redone}, {seconds:.0f} s in all"


def wait_for(condition, explain=str):
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def assert_same_run(a, b):
    left, right = (
        unpack_checkpoint(read_checkpoint(folder / "checkpoints/last.pt"), "") for folder in (a, b)
    )
    assert left["step"] == right["step"] == STEPS
    for key in ("model", "ema"):
        assert all(torch.equal(left[key][name], right[key][name]) for name in right[key]), key
    for number, entry in right["optimizer"]["state"].items():
        assert torch.equal(
            left["optimizer"]["state"][number]["momentum_buffer"], entry["momentum_buffer"]
        )
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in CLOCK_KEYS}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (a, b)
    ]
    assert lines[0] == lines[1]


def time_limit(place):
    """A warning a minute before the limit: saved, requeued, finished."""
    job = Job(
        place,
        *options(cluster__time_min=2, cluster__signal_delay_s=60, cluster__extra__nodelist="n1"),
        seconds="$([ ${SLURM_RESTART_COUNT:-0} = 0 ] && echo 4 || echo 0)",
    )
    job.wait_for_step(1)
    place.folder.with_name("under_way").touch()
    job.wait_until(lambda: "SIGUSR2, checkpoint, requeue" in job.log(0))
    # On a busy machine each further attempt would meet this limit as well.
    subprocess.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=30"], check=True)
    return job.check(at_most=3)


def two_nodes_with_two_ranks_each(place):
    """As a user does it, who waits for the end; the code is a copy, and speaks of the original's
    folder nowhere.
    """
    started = time.monotonic()
    done = submit_and_wait(place, "--cluster.nodes", "2", "--cluster.extra.nodelist", "n1,n6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all ranks succeeded" in done.stdout
    folder = next(place.folder.glob("job_*"))
    log = next(folder.glob("*_0_attempt0_log.out")).read_text()
    assert (
        "attempt 0, rank 0 of 4 on n1 n6" in log
        and "batch 120 = 4 cpu ranks * 1 micro-steps * 30" in log
    )
    assert "finished; " in log and "report       resnet-dist report" in log
    assert (folder / "code/resnet_dist/engine.py").exists() and (
        folder / "code/configs/quickstart.yaml"
    ).exists()
    assert_same_run(place.folder, place.undisturbed[4])
    return f"{time.monotonic() - started:.0f} s"


def submit_and_wait(place, *more):
    """A user's command: its exit code, and what it said."""
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "slurm/submit.py"),
            *training(place.digits, place.folder),
            "--cluster.gpus_per_node",
            "2",
            "--cluster.wait",
            *more,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )


def one_job_through_signals_requeue_and_preemption(place):
    """A SIGTERM that SLURM knows nothing of, a user's signal, a requeue, a preemption with a grace
    period: none costs a step, and the weights are the undisturbed run's.
    """
    job = Job(place, "--cluster.partition", "lowgrace", "--cluster.extra.nodelist", "n2")
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=TERM", job.id], check=True)
    job.wait_until(lambda: "SIGTERM, checkpoint, go on" in job.log(0))
    job.wait_for_step(6)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    job.wait_for_step(10, attempt=1)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.wait_for_step(14, attempt=2)
    preempt("n2")
    said = job.check(attempts=4)
    for attempt, verdict in enumerate(
        (
            "SIGUSR2, checkpoint, requeue",
            "SIGTERM, checkpoint, wait",
            "SIGTERM, checkpoint, requeue",
        )
    ):
        assert verdict in job.log(attempt)
    return said


def preempt(node):
    """A short job of a partition above takes the whole node."""
    subprocess.run(
        ["sbatch", "-phigh", f"-w{node}", "--exclusive", "-o/dev/null", "--wrap=sleep 1"],
        check=True,
    )


def preempted_at_once_and_then_cancelled(place):
    """Without a grace period SLURM requeues; a cancelled job is not brought back to life."""
    job = Job(place, "--cluster.extra.nodelist", "n3", "--cluster.gpus_per_node", "1", ranks=1)
    job.wait_for_step(3)
    preempt("n3")
    job.wait_for_step(8, attempt=1)
    subprocess.run(["scancel", job.id], check=True)
    assert job.finish() == 1
    assert "SIGTERM, checkpoint, wait" in job.log(0) and "SIGTERM, checkpoint, wait" in job.log(1)
    assert f"; step {job.logged(0)[-1]}, from" in job.log(1)
    time.sleep(3)
    assert status.show_job(job.id)["JobState"] == "CANCELLED" and not job.log(2)


def processes_of(node, folder):
    """The pids of a node's daemon and of all that it has started: they see the node's host name."""
    own = os.readlink(f"/proc/{(folder / f'slurmd-{node}.pid').read_text().strip()}/ns/uts")
    for path in Path("/proc").glob("[0-9]*/ns/uts"):
        with contextlib.suppress(OSError):
            if os.readlink(path) == own:
                yield int(path.parts[2])


def a_node_dies(place):
    """Its daemon and every process on it are killed; the job comes back on the spare node."""
    job = Job(
        place,
        *options(cluster__nodes=2, cluster__gpus_per_node=1, cluster__extra__exclude="n1,n2,n3"),
    )
    job.wait_for_step(8)
    assert "rank 0 of 2 on n4 n5" in job.log(0)
    for pid in list(processes_of("n5", place.cluster)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    job.wait_until(lambda: job.logged(1))
    seconds = time.monotonic() - killed
    subprocess.run([str(place.cluster / "node.sh"), "n5"], check=True)
    said = job.check(lost=5)
    assert "rank 0 of 2 on n4 n6" in job.log(1)
    return f"{said}; from the kill to the next step {seconds:.0f} s"


def a_rank_that_is_lost(place):
    """One of two ranks is killed, as by the kernel when memory is short: neither fault nor end of
    the job.
    """
    job = Job(place, "--cluster.extra.nodelist", "n1")
    job.wait_for_step(8)
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if (
                f"SLURM_JOB_ID={job.id}".encode() in words
                and b"SLURM_PROCID=1" in words
                and b"submitit" in (path.parent / "cmdline").read_bytes()
            ):
                os.kill(int(path.parts[2]), signal.SIGKILL)
    return job.check(lost=5)


def what_fails_by_itself_is_not_requeued(place):
    """One rank raises: the others are ended, and the client shows that rank's error."""
    done = submit_and_wait(
        place,
        "--cluster.extra.nodelist",
        "n1",
        "--cluster.setup+=export FAIL_AT=1:3",
        f"--cluster.setup+=export PYTHONPATH={HERE / 'slow'}",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    shown = status.show_job(re.match(r"job (\d+), 2 ranks", done.stdout)[1])
    assert shown["JobState"] == "FAILED" and shown["Restarts"] == "0"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert (
        lines[0].startswith("error (rank 1): ")
        and "this rank broke, as the test asked" in done.stderr
    )


ODD = """it's "a" $(touch INTRUDER) `touch INTRUDER`; touch INTRUDER & #x {} *?"""


def requeues_have_an_end(place):
    """In a folder, and with a comment, that the shell and sbatch would misread without quotes."""
    folder = place.folder / ODD
    folder.mkdir()
    job = Job(
        replace(place, folder=folder),
        f"--cluster.extra.comment={ODD}",
        *options(cluster__max_requeues=0, cluster__extra__nodelist="n1", cluster__gpus_per_node=1),
        ranks=1,
    )
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    assert job.finish() == 1
    assert status.show_job(job.id)["JobState"] == "FAILED" and not job.log(1)
    assert "cluster.max_requeues is 0" in job.log(0)
    shown = subprocess.run(
        ["scontrol", "-o", "show", "job", job.id], capture_output=True, text=True, check=True
    )
    assert f"Comment={ODD} " in shown.stdout
    assert list(place.folder.rglob("INTRUDER")) == []


def array_of_seeds(place):
    """Each seed has its own folder; a stray SIGTERM to one is not judged by the other's state."""
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(
            submit_and_wait,
            place,
            *options(
                cluster__gpus_per_node=0,
                cluster__tasks_per_node=1,
                cluster__seeds="0,1",
                cluster__extra__nodelist="n1",
            ),
            f"--cluster.setup+=export PYTHONPATH={HERE / 'slow'}",
            "--cluster.setup+=export SLOW_SECONDS=$((SLURM_ARRAY_TASK_ID * 3))e-1",
        )
        wait_for(
            lambda: (
                waiting.done()
                or any(
                    "step  3/" in log.read_text()
                    for log in place.folder.glob("job_*/*_1_0_attempt0_log.out")
                )
            )
        )
        (log,) = place.folder.glob("job_*/*_1_0_attempt0_log.out")
        subprocess.run(
            ["scancel", "--signal=TERM", log.name.removesuffix("_0_attempt0_log.out")], check=True
        )
        done = waiting.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"job \d+_(\d), 1 ranks, ", done.stdout) == ["0", "1"]
    assert re.findall(r"job \d+_(\d): COMPLETED, all ranks succeeded", done.stdout) == ["0", "1"]
    assert "SIGTERM, checkpoint, go on" in log.read_text()
    losses = [
        json.loads((place.folder / f"seed_{seed}/metrics.jsonl").read_text().splitlines()[-1])[
            "val/loss"
        ]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]


SCENARIOS = [
    one_job_through_signals_requeue_and_preemption,
    a_node_dies,
    preempted_at_once_and_then_cancelled,
    a_rank_that_is_lost,
    two_nodes_with_two_ranks_each,
    what_fails_by_itself_is_not_requeued,
    array_of_seeds,
    requeues_have_an_end,
    time_limit,
]


@pytest.fixture(scope="module")
def played(request, cluster, digits, undisturbed, tmp_path_factory):
    """The scenarios that were asked for, as futures. The one with the time limit begins first, and
    alone: its clock must not run out while it waits for a busy machine.
    """
    wanted = [
        item.callspec.params["scenario"]
        for item in request.session.items
        if item.path == request.path
    ]
    wanted = [scenario for scenario in wanted if cluster is not None or scenario is not a_node_dies]
    place = tmp_path_factory.mktemp("slurm")
    pool, futures = ThreadPoolExecutor(4), {}
    try:
        for scenario in sorted(wanted, key=lambda scenario: scenario is not time_limit):
            (folder := place / scenario.__name__).mkdir()
            futures[scenario] = pool.submit(scenario, Place(cluster, digits, undisturbed, folder))
            if scenario is time_limit:
                wait_for(lambda: (place / "under_way").exists() or futures[time_limit].done())
        yield futures
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_slurm(played, scenario):
    if scenario not in played:
        pytest.skip("a node of a cluster that is not ours is not killed")
    print(
        f"{scenario.__name__}: {scenario.__doc__ or ''}\n"
        f"{played[scenario].result() or 'as expected'}"
    )
