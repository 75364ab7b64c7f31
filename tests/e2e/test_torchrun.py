"""The commands of the README, as a user types them: real torchrun, real processes."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dist_utils import logged_lines, options, whole_lines
from wandb_server import wandb_environment

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
SMALL = options(
    data__train_crop_size=8,
    data__val_resize_size=8,
    data__val_crop_size=8,
    train__epochs=2,
    log__interval_steps=1,
)
QUICKSTART_STEPS = 308
QUICKSTART_LOG_INTERVAL = 22


def torchrun(ranks, *arguments):
    """The command that a user types: torchrun, with train.py."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--standalone",
        *("--nproc_per_node", str(ranks)),
        str(ROOT / "train.py"),
        *arguments,
    ]


def launch(*arguments):
    """`resnet-dist launch` with two ranks."""
    return [
        *(sys.executable, "-m", "resnet_dist.cli", "launch"),
        "--standalone",
        *("--nproc_per_node", "2"),
        *arguments,
    ]


@pytest.fixture
def environment(tmp_path):
    """No key, no network for W&B, and a home of our own."""
    return wandb_environment(tmp_path, "http://127.0.0.1:9", OMP_NUM_THREADS="1")


def logged_steps(folder):
    """The steps that a run has logged a loss of."""
    return [line["step"] for line in whole_lines(folder) if "train/loss" in line]


def print_nothing():
    return ""


def wait_until_logged(step, folder, process, printed=print_nothing):
    """Until the run in `folder` has logged `step`; `process` may not end before."""
    deadline = time.monotonic() + 300
    while max(logged_steps(folder), default=-1) < step:
        assert process.poll() is None, printed()
        assert time.monotonic() < deadline, printed()
        time.sleep(0.05)


def stopped_step(printed):
    """The step at which a run says that it stopped."""
    found = re.search(r"stopped at step (\d+) of", printed)
    return int(found[1])


def test_the_quickstart_is_interrupted_and_reaches_its_accuracy(tmp_path, environment):
    """No arguments at all: it says what it runs. Ctrl-C (SIGINT to torchrun), then the command that
    the run itself printed: it goes on, and ends above 97 %.
    """
    first = subprocess.Popen(
        torchrun(2),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "runs" / "quickstart"
    wait_until_logged(QUICKSTART_LOG_INTERVAL, run, first)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=180)
    assert first.returncode != 0
    assert printed.startswith("no arguments: running the quickstart, --config quickstart\n")
    stopped = stopped_step(printed)
    assert f"stopped at step {stopped} of {QUICKSTART_STEPS}" in printed
    assert logged_steps(run)[-1] == stopped
    assert printed.count("W&B is offline") == 1
    assert "wandb sync" in printed

    resume = re.search(r"resume +(.*torchrun --standalone .*)", printed)
    again = subprocess.run(
        resume[1],
        shell=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    saved = f"runs/quickstart/checkpoints/step_{stopped:08d}.pt"
    assert f"step {stopped}, from {saved}" in again.stdout
    regular = range(QUICKSTART_LOG_INTERVAL, QUICKSTART_STEPS + 1, QUICKSTART_LOG_INTERVAL)
    assert logged_steps(run) == sorted({*regular, stopped})

    # A finished run offers what comes next.
    assert "finished; best val top-1" in again.stdout
    assert "resume  " not in again.stdout
    for command in (
        "evaluate --weights",
        "predict --weights",
        "report runs/quickstart",
    ):
        assert f"resnet-dist {command}" in again.stdout
    for label, name in (
        ("checkpoints", "checkpoints/last.pt"),
        ("config", "config.yaml"),
        ("metrics", "metrics.jsonl"),
    ):
        assert re.search(rf"{label} +runs/quickstart/{name}", again.stdout)
        assert (run / name).exists()

    # Two sessions of one run of W&B.
    sessions = list((run / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    run_ids = {session.name.rpartition("-")[2] for session in sessions}
    assert len(run_ids) == 1

    last = logged_lines(run)[-1]
    assert last["val/num"] == 355
    assert last["val/top1"] >= 97
    print(f"quickstart: top-1 {last['val/top1']:.2f} % after {last['elapsed']:.0f} s")


def test_sigkill_of_torchrun(tmp_path, environment):
    """Row of the table of faults: its workers are no orphans that train on; they save, leave, and
    the same command goes on from that very step.
    """
    run = tmp_path / "run"
    log = tmp_path / "printed"
    command = torchrun(
        2,
        *("--config", QUICKSTART),
        *SMALL,
        *options(output_dir="run", train__epochs=60, log__wandb="disabled"),
    )
    with log.open("w") as printed:
        first = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=printed,
            stderr=printed,
        )
        wait_until_logged(4, run, first, log.read_text)
        workers = children_of(first.pid)
        assert len(workers) == 2
        first.kill()
        first.wait()

    deadline = time.monotonic() + 300
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    text = log.read_text()
    assert re.search("warning .*torchrun, .* is gone: saving, and leaving", text), text
    assert "frame #" not in text
    assert "Traceback" not in text
    stopped = stopped_step(text)
    assert logged_steps(run)[-1] == stopped
    saved = run / "checkpoints" / f"step_{stopped:08d}.pt"
    assert saved.exists()


def children_of(pid):
    """The process ids of the children of a process."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_running(pid):
    """Whether a process is there that is not a zombie."""
    try:
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return command_line != b""


def test_launch_ends_with_our_words_and_our_code(tmp_path, environment):
    """Through torchrun the same failure is code 1, and its page repeats our sentence at its end."""
    refused = (
        *("--config", QUICKSTART),
        *("--data.kind", "folder"),
        *("--data.data_dir", "/nowhere"),
    )

    def run(command):
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    ours = run(launch("train", *refused))
    assert ours.returncode == 2
    error, ending = ours.stderr.splitlines()
    assert error.startswith("error (rank ")
    assert "data.data_dir" in error
    assert re.fullmatch(r"rank \d ended with exit code 2: an error that you can mend.*", ending)

    theirs = run(torchrun(1, *refused))
    assert theirs.returncode == 1
    assert "Traceback" in theirs.stderr
    assert "data.data_dir" in theirs.stderr.splitlines()[-2]


def test_a_closed_session_saves(tmp_path, environment):
    """SIGHUP, as when ssh ends: the launcher passes it on, also under nohup."""
    run = tmp_path / "run"
    log = tmp_path / "printed"
    command = launch(
        "train",
        *("--config", QUICKSTART),
        *SMALL,
        *options(output_dir="run", train__epochs=60, log__wandb="disabled"),
    )
    with log.open("w") as printed:
        started = subprocess.Popen(
            ["nohup", *command],
            cwd=tmp_path,
            env=environment,
            stdout=printed,
            stderr=printed,
        )
        wait_until_logged(4, run, started, log.read_text)
        started.send_signal(signal.SIGHUP)
        code = started.wait(180)
    assert code == 128 + signal.SIGHUP
    text = log.read_text()
    saved = run / "checkpoints" / f"step_{stopped_step(text):08d}.pt"
    assert saved.exists()
    assert re.search(r"resume +resnet-dist launch --standalone .* train --config", text)
    assert "Traceback" not in text
