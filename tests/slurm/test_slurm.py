"""Trainings on a real SLURM cluster, and what may happen to them there. `pytest -rP` shows what
each event cost.

A scenario waits for most of its time. So four are played at once, each on nodes of its own where it
has to be, and a test waits for one of them. The cluster has six nodes, n1 to n6.
"""

import contextlib
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
from dist_utils import (
    equal_trees,
    last_checkpoint,
    logged_lines,
    options,
    run_to_the_end,
    small_run,
    without_clock,
)

from resnet_dist import cli
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.launch import status

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 24
# A line of a job's set-up: training steps take SLOW_SECONDS longer, see slow/sitecustomize.py.
SLOW_STEPS = f"export PYTHONPATH={HERE / 'slow'}"
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
        folder = tmp_path_factory.mktemp("undisturbed")
        run_to_the_end(world_size, ["train", *training(digits, folder)], folder)
        folders[world_size] = folder
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

    def __init__(self, place, *more, seconds="0.3", ranks=2):
        self.place = place
        self.output_dir = place.folder
        self.started = time.monotonic()
        arguments = [
            *training(place.digits, self.output_dir),
            f"--cluster.setup+={SLOW_STEPS}",
            f"--cluster.setup+=export SLOW_SECONDS={seconds}",
            *("--cluster.time_min", "30"),
            *("--cluster.gpus_per_node", "2"),
            *more,
        ]
        with SUBMITTING:
            assert cli.main(["submit", *arguments]) == 0
        self.folder = next(self.output_dir.glob("job_*"))
        submitted = next(self.folder.glob("*_submitted.pkl"))
        self.id, _ = submitted.name.split("_")
        self.job = submitit.SlurmJob(self.folder, self.id, tasks=range(ranks))

    def log(self, attempt, task=0):
        """What a task has printed in an attempt; empty before it begins."""
        path = self.folder / f"{self.id}_{task}_attempt{attempt}_log.out"
        return path.read_text() if path.exists() else ""

    def logged(self, attempt=0):
        """The steps that an attempt has logged."""
        steps = re.findall(rf"step +(\d+)/{STEPS} .* train ", self.log(attempt))
        return [int(step) for step in steps]

    def first_step(self, attempt):
        """The step from which an attempt goes on."""
        found = re.search(r"; step (\d+), from", self.log(attempt))
        return int(found[1])

    def last_step(self, attempt):
        """The step that an attempt has reached."""
        logged = self.logged(attempt)
        return logged[-1] if logged else self.first_step(attempt)

    def printed(self):
        """What all tasks have printed in all attempts."""
        texts = [path.read_text() for path in self.folder.glob("*log.out")]
        return "\n".join(texts)

    def wait_until(self, condition):
        wait_for(condition, self.printed)

    def wait_for_step(self, step, attempt=0):
        def is_reached():
            return max(self.logged(attempt), default=-1) >= step

        self.wait_until(is_reached)

    def finish(self):
        """The exit code of the client that waits."""

        def has_ended():
            return status.state_of(self.job) not in status.NOT_ENDED

        self.wait_until(has_ended)
        return status.wait([self.job], self.folder)

    def check(self, attempts=2, at_most=0, lost=0):
        """It finished with the undisturbed run's weights and metrics, in so many attempts; says
        what that cost.
        """
        assert self.finish() == 0, status.show_job(self.id)
        restarts = int(status.show_job(self.id)["Restarts"])
        assert restarts >= attempts - 1
        assert restarts <= max(attempts, at_most) - 1

        starts = [self.first_step(attempt) for attempt in range(restarts + 1)]
        resumed = starts[1:]
        redone = []
        for attempt, step in enumerate(resumed):
            redone.append(self.last_step(attempt) - step)
        assert max(redone, default=0) <= lost
        assert_same_run(self.output_dir, self.place.undisturbed[2])
        seconds = time.monotonic() - self.started
        return f"resumed at {resumed}, steps lost {redone}, {seconds:.0f} s in all"


def explain_nothing():
    return ""


def wait_for(condition, explain=explain_nothing):
    """Until the condition holds."""
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def momentum_of(content):
    """The momentum buffer of each parameter in a checkpoint."""
    states = content["optimizer"]["state"]
    return {number: state["momentum_buffer"] for number, state in states.items()}


def assert_same_run(output_dir, expected_dir):
    """Both runs have ended, with the same weights and the same lines."""
    found = last_checkpoint(output_dir)
    expected = last_checkpoint(expected_dir)
    assert found["step"] == STEPS
    assert expected["step"] == STEPS
    for part in ("model", "ema"):
        assert equal_trees(found[part], expected[part]), part
    assert equal_trees(momentum_of(found), momentum_of(expected))
    lines = without_clock(logged_lines(output_dir))
    assert lines == without_clock(logged_lines(expected_dir))


def time_limit(place):
    """A warning a minute before the limit: saved, requeued, finished."""
    job = Job(
        place,
        *options(cluster__time_min=2, cluster__signal_delay_s=60, cluster__extra__nodelist="n1"),
        seconds="$([ ${SLURM_RESTART_COUNT:-0} = 0 ] && echo 4 || echo 0)",
    )
    job.wait_for_step(1)
    under_way = place.folder.with_name("under_way")
    under_way.touch()
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
    assert "attempt 0, rank 0 of 4 on n1 n6" in log
    assert "batch 120 = 4 cpu ranks * 1 micro-steps * 30" in log
    assert "finished; " in log
    assert "report       resnet-dist report" in log
    code = folder / "code"
    assert (code / "resnet_dist/engine.py").exists()
    assert (code / "configs/quickstart.yaml").exists()
    assert_same_run(place.folder, place.undisturbed[4])
    return f"{time.monotonic() - started:.0f} s"


def submit_and_wait(place, *more):
    """A user's command: its exit code, and what it said."""
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "slurm/submit.py"),
            *training(place.digits, place.folder),
            *("--cluster.gpus_per_node", "2"),
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
    job = Job(
        place,
        *("--cluster.partition", "lowgrace"),
        *("--cluster.extra.nodelist", "n2"),
    )
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=TERM", job.id], check=True)
    job.wait_until(lambda: "SIGTERM, checkpoint, go on" in job.log(0))
    job.wait_for_step(6)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    job.wait_for_step(10, attempt=1)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.wait_for_step(14, attempt=2)
    preempt("n2")
    cost = job.check(attempts=4)
    assert "SIGUSR2, checkpoint, requeue" in job.log(0)
    assert "SIGTERM, checkpoint, wait" in job.log(1)
    assert "SIGTERM, checkpoint, requeue" in job.log(2)
    return cost


def preempt(node):
    """A short job of a partition above takes the whole node."""
    command = [
        "sbatch",
        "--partition=high",
        f"--nodelist={node}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    subprocess.run(command, check=True)


def preempted_at_once_and_then_cancelled(place):
    """Without a grace period SLURM requeues; a cancelled job is not brought back to life."""
    job = Job(
        place,
        *("--cluster.extra.nodelist", "n3"),
        *("--cluster.gpus_per_node", "1"),
        ranks=1,
    )
    job.wait_for_step(3)
    preempt("n3")
    job.wait_for_step(8, attempt=1)
    subprocess.run(["scancel", job.id], check=True)
    assert job.finish() == 1
    assert "SIGTERM, checkpoint, wait" in job.log(0)
    assert "SIGTERM, checkpoint, wait" in job.log(1)
    assert job.first_step(1) == job.last_step(0)
    time.sleep(3)
    assert status.show_job(job.id)["JobState"] == "CANCELLED"
    assert job.log(2) == ""


def processes_of(node, folder):
    """The pids of a node's daemon and of all that it has started: they see the node's host name."""
    daemon = (folder / f"slurmd-{node}.pid").read_text().strip()
    own_name_space = os.readlink(f"/proc/{daemon}/ns/uts")
    pids = []
    for path in Path("/proc").glob("[0-9]*/ns/uts"):
        pid = path.parts[2]
        with contextlib.suppress(OSError):
            if os.readlink(path) == own_name_space:
                pids.append(int(pid))
    return pids


def a_node_dies(place):
    """Its daemon and every process on it are killed; the job comes back on the spare node."""
    job = Job(
        place,
        *options(
            cluster__nodes=2,
            cluster__gpus_per_node=1,
            cluster__extra__exclude="n1,n2,n3",
        ),
    )
    job.wait_for_step(8)
    assert "rank 0 of 2 on n4 n5" in job.log(0)
    for pid in processes_of("n5", place.cluster):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    job.wait_until(lambda: job.logged(1))
    seconds = time.monotonic() - killed
    subprocess.run([str(place.cluster / "node.sh"), "n5"], check=True)
    cost = job.check(lost=5)
    assert "rank 0 of 2 on n4 n6" in job.log(1)
    return f"{cost}; from the kill to the next step {seconds:.0f} s"


def a_rank_that_is_lost(place):
    """One of two ranks is killed, as by the kernel when memory is short: neither fault nor end of
    the job.
    """
    job = Job(place, "--cluster.extra.nodelist", "n1")
    job.wait_for_step(8)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if is_second_rank(folder, job.id):
                os.kill(int(folder.name), signal.SIGKILL)
    return job.check(lost=5)


def is_second_rank(folder, job_id):
    """Whether a process, by its folder in /proc, is rank 1 of a job."""
    environment = (folder / "environ").read_bytes().split(b"\0")
    command = (folder / "cmdline").read_bytes()
    is_of_the_job = f"SLURM_JOB_ID={job_id}".encode() in environment
    return is_of_the_job and b"SLURM_PROCID=1" in environment and b"submitit" in command


def what_fails_by_itself_is_not_requeued(place):
    """One rank raises: the others are ended, and the client shows that rank's error."""
    done = submit_and_wait(
        place,
        *("--cluster.extra.nodelist", "n1"),
        "--cluster.setup+=export FAIL_AT=1:3",
        f"--cluster.setup+={SLOW_STEPS}",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    job_id = re.match(r"job (\d+), 2 ranks", done.stdout)[1]
    shown = status.show_job(job_id)
    assert shown["JobState"] == "FAILED"
    assert shown["Restarts"] == "0"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("error (rank 1): ")
    assert "this rank broke, as the test asked" in done.stderr


ODD = """it's "a" $(touch INTRUDER) `touch INTRUDER`; touch INTRUDER & #x {} *?"""


def requeues_have_an_end(place):
    """In a folder, and with a comment, that the shell and sbatch would misread without quotes."""
    folder = place.folder / ODD
    folder.mkdir()
    job = Job(
        replace(place, folder=folder),
        f"--cluster.extra.comment={ODD}",
        *options(
            cluster__max_requeues=0,
            cluster__extra__nodelist="n1",
            cluster__gpus_per_node=1,
        ),
        ranks=1,
    )
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    assert job.finish() == 1
    assert status.show_job(job.id)["JobState"] == "FAILED"
    assert job.log(1) == ""
    assert "cluster.max_requeues is 0" in job.log(0)
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job.id],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Comment={ODD} " in shown.stdout
    assert list(place.folder.rglob("INTRUDER")) == []


def array_of_seeds(place):
    """Each seed has its own folder; a stray SIGTERM to one is not judged by the other's state."""
    suffix = "_0_attempt0_log.out"

    def log_of_seed_1():
        """None before the job has begun."""
        return next(place.folder.glob(f"job_*/*_1{suffix}"), None)

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
            f"--cluster.setup+={SLOW_STEPS}",
            "--cluster.setup+=export SLOW_SECONDS=$((SLURM_ARRAY_TASK_ID * 3))e-1",
        )

        def has_seed_1_reached_step_3():
            log = log_of_seed_1()
            return log is not None and "step  3/" in log.read_text()

        wait_for(lambda: waiting.done() or has_seed_1_reached_step_3())
        log = log_of_seed_1()
        job_id = log.name.removesuffix(suffix)
        subprocess.run(["scancel", "--signal=TERM", job_id], check=True)
        done = waiting.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"job \d+_(\d), 1 ranks, ", done.stdout) == ["0", "1"]
    assert re.findall(r"job \d+_(\d): COMPLETED, all ranks succeeded", done.stdout) == ["0", "1"]
    assert "SIGTERM, checkpoint, go on" in log.read_text()

    last_of_seed_0 = logged_lines(place.folder / "seed_0")[-1]
    last_of_seed_1 = logged_lines(place.folder / "seed_1")[-1]
    assert last_of_seed_0["val/loss"] != last_of_seed_1["val/loss"]


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
    wanted = []
    for item in request.session.items:
        if item.path == request.path:
            wanted.append(item.callspec.params["scenario"])
    if cluster is None and a_node_dies in wanted:
        # A node of a cluster that is not ours is not killed.
        wanted.remove(a_node_dies)

    folder = tmp_path_factory.mktemp("slurm")
    pool = ThreadPoolExecutor(4)
    futures = {}

    def begin(scenario):
        own_folder = folder / scenario.__name__
        own_folder.mkdir()
        place = Place(cluster, digits, undisturbed, own_folder)
        futures[scenario] = pool.submit(scenario, place)

    try:
        if time_limit in wanted:
            wanted.remove(time_limit)
            begin(time_limit)
            under_way = folder / "under_way"
            wait_for(lambda: under_way.exists() or futures[time_limit].done())
        for scenario in wanted:
            begin(scenario)
        yield futures
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_slurm(played, scenario):
    if scenario not in played:
        pytest.skip("a node of a cluster that is not ours is not killed")
    cost = played[scenario].result() or "as expected"
    print(f"{scenario.__name__}: {scenario.__doc__}\n{cost}")
