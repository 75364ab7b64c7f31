"""The commands of the README, as a user types them: real torchrun, real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dist_utils import options

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TWO_RANKS = [*TORCHRUN, "2", str(ROOT / "train.py")]
SMALL = options(
    data__train_crop_size=8,
    data__val_resize_size=8,
    data__val_crop_size=8,
    train__epochs=2,
    log__interval_steps=1,
)
QUICKSTART_STEPS = 308
QUICKSTART_LOG_INTERVAL = 22


@pytest.fixture
def environment(tmp_path):
    """No key, no network for W&B, and a home of our own."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB")},
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }


def logged_steps(folder):
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [
        json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
    ]  # the whole ones
    return [line["step"] for line in lines if "train/loss" in line]


def wait_until_logged(step, folder, process, printed=lambda: ""):
    """Until the run in `folder` has logged `step`; `process` may not end before."""
    deadline = time.monotonic() + 300
    while max(logged_steps(folder), default=-1) < step:
        assert process.poll() is None, printed()
        assert time.monotonic() < deadline, printed()
        time.sleep(0.05)


def test_the_quickstart_is_interrupted_and_reaches_its_accuracy(tmp_path, environment):
    """No arguments at all: it says what it runs. Ctrl-C (SIGINT to torchrun), then the command that
    the run itself printed: it goes on, and ends above 97 %.
    """
    first = subprocess.Popen(
        TWO_RANKS,
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
    stopped = int(re.search(rf"stopped at step (\d+) of {QUICKSTART_STEPS}", printed).group(1))
    assert logged_steps(run)[-1] == stopped
    assert printed.count("W&B is offline") == 1
    assert "wandb sync" in printed

    resume = re.search(r"resume +(.*torchrun --standalone .*)", printed).group(1)
    again = subprocess.run(
        resume,
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
    assert "finished; best val top-1" in again.stdout
    assert "resume  " not in again.stdout  # a finished run offers what comes next
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
    sessions = list((run / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    assert len({session.name.rsplit("-", 1)[1] for session in sessions}) == 1

    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/num"] == 355
    assert last["val/top1"] >= 97
    print(f"quickstart: top-1 {last['val/top1']:.2f} % after {last['elapsed']:.0f} s")


def test_sigkill_of_torchrun(tmp_path, environment):
    """Row of the table of faults: its workers are no orphans that train on; they save, leave, and
    the same command goes on from that very step.
    """
    command = [
        *TWO_RANKS,
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        *SMALL,
        *options(output_dir="run", train__epochs=60, log__wandb="disabled"),
    ]
    with open(tmp_path / "printed", "w") as printed:
        first = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=printed, stderr=printed
        )
        wait_until_logged(4, tmp_path / "run", first, (tmp_path / "printed").read_text)
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        assert len(workers) == 2
        first.kill()
        first.wait()
    deadline = time.monotonic() + 300
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in workers
    ):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    text = (tmp_path / "printed").read_text()
    stopped = int(re.search(r"stopped at step (\d+) of", text)[1])
    assert re.search("warning .*torchrun, .* is gone: saving, and leaving", text), text
    assert "frame #" not in text and "Traceback" not in text
    assert logged_steps(tmp_path / "run")[-1] == stopped
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}.pt").exists()


def launch(*arguments):
    """`resnet-dist launch` with two ranks."""
    options = ["--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", "resnet_dist.cli", "launch", *options, *arguments]


def test_launch_ends_with_our_words_and_our_code(tmp_path, environment):
    """Through torchrun the same failure is code 1, and its page repeats our sentence at its end."""
    environment["PYTHONPATH"] = str(ROOT)
    refused = ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.kind", "folder"]
    refused += ["--data.data_dir", "/nowhere"]
    plain = [*TORCHRUN, "1", str(ROOT / "train.py")]
    ended = [
        subprocess.run(
            [*command, *refused],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        for command in (launch("train"), plain)
    ]
    assert [done.returncode for done in ended] == [2, 1]
    ours, theirs = (done.stderr.splitlines() for done in ended)
    assert len(ours) == 2, ours
    assert ours[0].startswith("error (rank ") and "data.data_dir" in ours[0]
    assert re.fullmatch(r"rank \d ended with exit code 2: an error that you can mend.*", ours[1])
    assert "data.data_dir" in theirs[-2] and "Traceback" in ended[1].stderr


def test_a_closed_session_saves(tmp_path, environment):
    """SIGHUP, as when ssh ends: the launcher passes it on, also under nohup."""
    environment["PYTHONPATH"] = str(ROOT)
    command = launch("train", "--config", str(ROOT / "configs/quickstart.yaml"), *SMALL)
    command += ["--output_dir", "run", "--log.wandb", "disabled", "--train.epochs", "60"]
    with open(tmp_path / "printed", "w") as printed:
        started = subprocess.Popen(
            ["nohup", *command], cwd=tmp_path, env=environment, stdout=printed, stderr=printed
        )
        wait_until_logged(4, tmp_path / "run", started, (tmp_path / "printed").read_text)
        started.send_signal(signal.SIGHUP)
        assert started.wait(180) == 128 + signal.SIGHUP
    text = (tmp_path / "printed").read_text()
    stopped = int(re.search(r"stopped at step (\d+) of", text)[1])
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}.pt").exists()
    assert re.search(r"resume +resnet-dist launch --standalone .* train --config", text)
    assert "Traceback" not in text
