"""Trainings on a real SLURM cluster, and what may happen to them there. `pytest -s` prints what each event cost."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit
import torch
from dist_utils import run_app

from resnet_dist import cli, launch
from resnet_dist.checkpoint import read_checkpoint, unpack_checkpoint
from resnet_dist.data.digits import write_digits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 24
CLOCK = {"time", "elapsed", "train/images_per_second", "train/data_wait_fraction", "train/step_seconds"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(str(folder))
    return folder


def training(digits, output_dir):
    """Twelve steps an epoch on small images, each step logged, a checkpoint every five steps and at each epoch."""
    return ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.data_dir", str(digits),
            "--output_dir", str(output_dir), "--data.train_crop_size", "16", "--data.val_resize_size", "16",
            "--data.val_crop_size", "16", "--train.epochs", "2", "--train.global_batch_size", "120",
            "--train.precision", "fp32", "--train.ema_decay", "0.9", "--checkpoint.interval_steps", "5",
            "--log.interval_steps", "1", "--distributed.timeout_s", "60", "--log.wandb", "disabled",
            "--distributed.threads", "1", "--data.threads", "1"]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """Runs without SLURM and without trouble, by the number of ranks."""
    folders = {}
    for world_size in (2, 4):
        folder = folders[world_size] = tmp_path_factory.mktemp("undisturbed")
        assert run_app(world_size, ["train", *training(digits, folder)], str(folder / "log")) == [0] * world_size
    return folders


class Job:
    """A submitted training: two ranks on one node with fake GPUs, unless `more` says something else."""

    def __init__(self, digits, output_dir, *more, seconds=0.3, setup=(), ranks=2):
        self.output_dir = output_dir
        lines = [f"export PYTHONPATH={HERE / 'slow'}", f"export SLOW_SECONDS={seconds}", *setup]
        arguments = [*training(digits, output_dir), *[f"--cluster.setup+={line}" for line in lines],
                     "--cluster.time_min", "30", "--cluster.gpus_per_node", "2", *more]
        self.started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(["submit", *arguments]) == 0
        self.id = re.match(r"job (\d+)", said.getvalue()).group(1)
        self.folder = next(output_dir.glob("job_*"))
        self.job = submitit.SlurmJob(self.folder, self.id, tasks=range(ranks))

    def log(self, attempt, task=0):
        path = self.folder / f"{self.id}_{task}_attempt{attempt}_log.out"
        return path.read_text() if path.exists() else ""

    def logged(self, attempt=0):
        """The steps that an attempt has logged."""
        return [int(step) for step in re.findall(rf"step +(\d+)/{STEPS} .* train ", self.log(attempt))]

    def wait_until(self, condition, seconds=150):
        wait_for(condition, seconds, lambda: "\n".join(path.read_text() for path in self.folder.glob("*log.out")))

    def wait_for_step(self, step, attempt=0):
        self.wait_until(lambda: (self.logged(attempt) or [-1])[-1] >= step)

    def finish(self):
        """The exit code of the client that waits."""
        return launch.wait([self.job], self.folder)

    def check(self, undisturbed, event, attempts=2, lost=0):
        """It finished with the undisturbed run's weights and metrics, in so many attempts, and says what that cost."""
        assert self.finish() == 0
        assert int(launch.show_job(self.id)["Restarts"]) == attempts - 1
        starts = [int(re.search(r"; step (\d+), from", self.log(k)).group(1)) for k in range(attempts)]
        redone = [self.logged(k)[-1] - starts[k + 1] for k in range(attempts - 1)]
        seconds = time.monotonic() - self.started
        print(f"\n{event}: resumed at {starts[1:]}, steps lost {redone}, {seconds:.0f} s in all")
        assert max(redone, default=0) <= lost
        assert_same_run(self.output_dir, undisturbed)


def wait_for(condition, seconds=150, explain=str):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def assert_same_run(a, b):
    left, right = (unpack_checkpoint(read_checkpoint(folder / "checkpoints/last.pt"), "") for folder in (a, b))
    assert left["step"] == right["step"] == STEPS
    for key in ("model", "ema"):
        assert all(torch.equal(left[key][name], right[key][name]) for name in right[key]), key
    for number, entry in right["optimizer"]["state"].items():
        assert torch.equal(left["optimizer"]["state"][number]["momentum_buffer"], entry["momentum_buffer"])
    lines = [[{key: value for key, value in json.loads(line).items() if key not in CLOCK}
              for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def time_limited(cluster, digits, tmp_path_factory):
    """Runs into its time limit while the other tests go on, on node n3."""
    return Job(digits, tmp_path_factory.mktemp("limit"), "--cluster.time_min", "2", "--cluster.signal_delay_s", "60",
               "--cluster.extra.nodelist", "n3", seconds="$([ ${SLURM_RESTART_COUNT:-0} = 0 ] && echo 4 || echo 0)")


def test_two_nodes_with_two_ranks_each(cluster, digits, undisturbed, time_limited, tmp_path):
    """As a user does it, who waits for the end; the code is a copy, and speaks of the original's folder nowhere."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "slurm/submit.py"), *training(digits, tmp_path),
                           "--cluster.nodes", "2", "--cluster.gpus_per_node", "2", "--cluster.wait"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all ranks succeeded" in done.stdout
    folder = next(tmp_path.glob("job_*"))
    log = next(folder.glob("*_0_attempt0_log.out")).read_text()
    assert "attempt 0, rank 0 of 4 on n1 n2" in log and "batch 120 = 4 cpu ranks * 1 micro-steps * 30" in log
    assert "resume       python slurm/submit.py --config" in log
    assert (folder / "code/resnet_dist/engine.py").exists() and (folder / "code/configs/quickstart.yaml").exists()
    assert_same_run(tmp_path, undisturbed[4])
    print(f"\n2 nodes * 2 ranks: {time.monotonic() - started:.0f} s")


def test_one_job_through_signals_requeue_and_preemption(cluster, digits, undisturbed, tmp_path):
    """A SIGTERM that SLURM knows nothing of, a user's signal, a requeue, a preemption with a grace period: none costs a
    step, and the weights are the undisturbed run's.
    """
    job = Job(digits, tmp_path, "--cluster.partition", "lowgrace", "--cluster.extra.nodelist", "n2")
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=TERM", job.id], check=True)
    job.wait_until(lambda: "SIGTERM, checkpoint, go on" in job.log(0))
    job.wait_for_step(6)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    job.wait_for_step(10, attempt=1)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.wait_for_step(14, attempt=2)
    preempt("n2")
    job.check(undisturbed[2], "stray TERM; USR2, scontrol requeue, preemption with grace", attempts=4)
    for attempt, said in enumerate(("SIGUSR2, checkpoint, requeue", "SIGTERM, checkpoint, wait",
                                    "SIGTERM, checkpoint, requeue")):
        assert said in job.log(attempt)


def preempt(node):
    """A short job of a partition above takes the whole node."""
    subprocess.run(["sbatch", "-phigh", f"-w{node}", "--exclusive", "-o/dev/null", "--wrap=sleep 1"], check=True)


def test_preempted_at_once_and_then_cancelled(cluster, digits, tmp_path):
    """Without a grace period SLURM requeues; a cancelled job is not brought back to life."""
    job = Job(digits, tmp_path, "--cluster.extra.nodelist", "n2", "--cluster.gpus_per_node", "1", ranks=1)
    job.wait_for_step(3)
    preempt("n2")
    job.wait_for_step(8, attempt=1)
    subprocess.run(["scancel", job.id], check=True)
    assert job.finish() == 1
    assert "SIGTERM, checkpoint, wait" in job.log(0) and "SIGTERM, checkpoint, wait" in job.log(1)
    assert f"; step {job.logged(0)[-1]}, from" in job.log(1)
    time.sleep(3)
    assert launch.show_job(job.id)["JobState"] == "CANCELLED" and not job.log(2)


def processes_of(node, folder):
    """The pids of a node's daemon and of all that it has started: they see the node's host name."""
    own = os.readlink(f"/proc/{(folder / f'slurmd-{node}.pid').read_text().strip()}/ns/uts")
    for path in Path("/proc").glob("[0-9]*/ns/uts"):
        with contextlib.suppress(OSError):
            if os.readlink(path) == own:
                yield int(path.parts[2])


def test_a_node_dies(cluster, digits, undisturbed, tmp_path):
    """Its daemon and every process on it are killed; the job comes back on the spare node."""
    if cluster is None:
        pytest.skip("a node of a cluster that is not ours is not killed")
    job = Job(digits, tmp_path, "--cluster.nodes", "2", "--cluster.gpus_per_node", "1")
    job.wait_for_step(8)
    assert "rank 0 of 2 on n1 n2" in job.log(0)
    for pid in list(processes_of("n2", cluster)):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    job.wait_until(lambda: job.logged(1), 240)
    print(f"\nfrom the kill to the next step: {time.monotonic() - killed:.0f} s")
    subprocess.run([str(cluster / "node.sh"), "n2"], check=True)
    job.check(undisturbed[2], "a node's processes killed", lost=5)
    assert "rank 0 of 2 on n1 n3" in job.log(1)


def test_a_rank_that_is_lost(cluster, digits, undisturbed, tmp_path):
    """One of two ranks is killed, as by the kernel when memory is short: neither fault nor end of the job."""
    job = Job(digits, tmp_path, "--cluster.extra.nodelist", "n1")
    job.wait_for_step(8)
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job.id}".encode() in words and b"SLURM_PROCID=1" in words and b"submitit" in (
                    path.parent / "cmdline").read_bytes():
                os.kill(int(path.parts[2]), signal.SIGKILL)
    job.check(undisturbed[2], "a rank killed", lost=5)


def test_what_fails_by_itself_is_not_requeued(cluster, digits, capsys, tmp_path):
    """One rank raises: the others are ended, and the client shows that rank's error."""
    job = Job(digits, tmp_path, setup=["export FAIL_AT=1:3"], seconds=0)
    assert job.finish() == 1
    shown = launch.show_job(job.id)
    assert shown["JobState"] == "FAILED" and shown["Restarts"] == "0"
    said = capsys.readouterr().err
    assert said.startswith("error (rank 1): ") and "this rank broke, as the test asked" in said


def test_requeues_have_an_end(cluster, digits, tmp_path):
    job = Job(digits, tmp_path, "--cluster.max_requeues", "0", "--cluster.gpus_per_node", "1", ranks=1)
    job.wait_for_step(3)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    assert job.finish() == 1
    assert launch.show_job(job.id)["JobState"] == "FAILED" and not job.log(1)
    assert "cluster.max_requeues is 0" in job.log(0)


def test_array_of_seeds(cluster, digits, capsys, tmp_path):
    """Each seed in a folder of its own; a stray SIGTERM to one is not judged by the other's state."""
    assert cli.main(["submit", *training(digits, tmp_path), "--cluster.gpus_per_node", "0", "--cluster.tasks_per_node",
                     "1", "--cluster.seeds", "0,1", f"--cluster.setup+=export PYTHONPATH={HERE / 'slow'}",
                     '--cluster.setup+=export SLOW_SECONDS=$((SLURM_ARRAY_TASK_ID * 2))e-1']) == 0
    ids = re.findall(r"job (\d+_\d), 1 ranks, ", capsys.readouterr().out)
    folder = next(tmp_path.glob("job_*"))
    log = folder / f"{ids[1]}_0_attempt0_log.out"
    wait_for(lambda: log.exists() and "step  3/" in log.read_text())
    subprocess.run(["scancel", "--signal=TERM", ids[1]], check=True)
    assert launch.wait([submitit.SlurmJob(folder, name) for name in ids], folder) == 0
    assert len(re.findall(r"job \d+_[01]: COMPLETED, all ranks succeeded", capsys.readouterr().out)) == 2
    assert "SIGTERM, checkpoint, go on" in log.read_text()
    losses = [json.loads((tmp_path / f"seed_{seed}/metrics.jsonl").read_text().splitlines()[-1])["val/loss"]
              for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_time_limit(cluster, undisturbed, time_limited):
    """A warning a minute before the limit: saved, requeued, finished."""
    time_limited.check(undisturbed[2], "time limit")
    assert "SIGUSR2, checkpoint, requeue" in time_limited.log(0)
