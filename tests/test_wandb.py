"""W&B that is unreachable, lost in the middle, or back again, against a small server that imitates
it on loopback.

The client is the real one, in a process of its own. Training never waits, and what it has not sent
is in files that `wandb sync` completes the run with.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from dist_utils import whole_lines
from wandb_server import Server, wandb_environment

SESSION = """
import os, sys, time
from resnet_dist.logs import log as m
from resnet_dist.logs.sinks import wandb as w
from resnet_dist.config import LogConfig
start, stop, w._FINISH_SECONDS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
m.CLOSE_SECONDS = 120 + w._FINISH_SECONDS
log = m.build_log(LogConfig(), "run", True, {"model": {"name": "resnet20"}})
log.start(start, 100)
log.sinks[0]._start_is_over.wait()
longest = 0.0
for step in range(start + 1, stop + 1):
    before = time.monotonic()
    log.metrics(step, {"train/epoch": step / 10, "train/loss": float(step), "train/top1": 1.0})
    longest = max(longest, time.monotonic() - before)
    time.sleep(0.1)
    while step == 20 and os.path.exists("hold"):
        time.sleep(0.02)
log.close(0)
print(f"longest {longest}")
"""


@pytest.fixture
def server():
    server = Server()
    server.start()
    yield server
    server.stop()
    assert not server.unknown, (
        f"the client asks for more than the server imitates: {server.unknown}"
    )


def environment(tmp_path, server):
    url = f"http://127.0.0.1:{server.port}"
    return wandb_environment(tmp_path, url, WANDB_SILENT="true", WANDB_API_KEY="a" * 40)


def train(tmp_path, server, start, stop, finish_seconds=90):
    """A process that logs the steps start + 1 to stop, ten a second."""
    return subprocess.Popen(
        [sys.executable, "-c", SESSION, str(start), str(stop), str(finish_seconds)],
        cwd=tmp_path,
        env=environment(tmp_path, server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def finish(process):
    """What it printed; no call of the log waited for the server, whatever it did."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert float(printed.split("longest ")[1]) < 15, printed
    return printed


def sync(tmp_path, server, *options):
    """Upload later, as the message of the run says."""
    command = [Path(sys.executable).with_name("wandb"), "sync", *options, "run/wandb"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(tmp_path, server),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_id(tmp_path):
    return (tmp_path / "run" / "wandb_run_id").read_text().strip()


def logged(tmp_path):
    """The steps that the run has logged."""
    return [line["step"] for line in whole_lines(tmp_path / "run")]


def lose(tmp_path, server):
    """End the server while the run is under way: it goes no further than step 20 before."""
    deadline = time.monotonic() + 180
    while len(logged(tmp_path)) < 10:
        assert time.monotonic() < deadline, server.requests
        time.sleep(0.02)
    server.stop()
    (tmp_path / "hold").unlink()
    assert len(server.runs[run_id(tmp_path)]["history"]) <= 20


@pytest.mark.slow
def test_lost_in_the_middle_and_back_again(tmp_path, server):
    """Nothing is missing and nothing is there twice; then a second attempt goes on with the same
    run.
    """
    (tmp_path / "hold").touch()
    process = train(tmp_path, server, 0, 60)
    lose(tmp_path, server)
    time.sleep(2)
    server.start()
    printed = finish(process)
    assert f"W&B: http://127.0.0.1:{server.port}/" in printed
    assert server.steps(run_id(tmp_path)) == list(range(1, 61))
    assert server.runs[run_id(tmp_path)]["exit"] == 0
    finish(train(tmp_path, server, 58, 65))
    assert server.steps(run_id(tmp_path)) == list(range(1, 66))
    assert len(server.runs) == 1


@pytest.mark.slow
def test_lost_for_good_and_synced_later(tmp_path, server):
    (tmp_path / "hold").touch()
    process = train(tmp_path, server, 0, 40, finish_seconds=2)
    lose(tmp_path, server)
    printed = finish(process)
    assert (
        "did not finish within 2 s; to upload later: wandb sync --include-online run/wandb\n"
        in printed
    )
    assert len(server.runs[run_id(tmp_path)]["history"]) < 40
    assert logged(tmp_path) == list(range(1, 41))
    server.start()
    sync(tmp_path, server, "--include-online")
    assert server.steps(run_id(tmp_path)) == list(range(1, 41))


@pytest.mark.slow
def test_unreachable_at_the_start_and_synced_later(tmp_path, server):
    server.stop()
    printed = finish(train(tmp_path, server, 0, 20))
    assert "W&B is offline" in printed
    assert "going online failed" in printed
    server.start()
    sync(tmp_path, server)
    assert server.steps(run_id(tmp_path)) == list(range(1, 21))
    printed = finish(train(tmp_path, server, 20, 25))  # the network is back for the next attempt
    assert "W&B: http" in printed
    assert server.steps(run_id(tmp_path)) == list(range(1, 26))
    assert len(server.runs) == 1
