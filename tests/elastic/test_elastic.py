"""Elastic torchrun on the loopback interface: three agents, one of them killed, and one that joins.

Outside the quick suite (`-m long`): the agents wait for each other, which takes minutes.
"""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dist_utils import by_step, free_port, last_logged_step, logged_lines, small_run

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import sys
from resnet_dist.commands.launch import launch_workers
sys.exit(launch_workers(sys.argv[1:], ()))
"""
WORKER = str(ROOT / "tests/elastic/worker.py")
SECONDS_PER_STEP = 0.3
EPOCHS = 8
# 1,442 images in batches of 64.
STEPS = EPOCHS * 22


class Agents:
    """The agents of one elastic job, by name, and the run that their workers write."""

    def __init__(self, folder, digits):
        self.folder = folder
        self.run_folder = folder / "run"
        self.digits = digits
        self.port = free_port()
        self.running = {}

    def start(self, name, ranks):
        """An agent with so many ranks. The first that is started hosts the rendezvous."""
        is_host = int(not self.running)
        rendezvous_settings = (
            f"is_host={is_host}",
            "last_call_timeout=4",
            "keep_alive_interval=1",
            "keep_alive_max_attempt=3",
        )
        command = [
            *(sys.executable, "-c", LAUNCH),
            *("--nnodes", "1:3"),
            *("--nproc_per_node", str(ranks)),
            *("--max-restarts", "9"),
            *("--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"127.0.0.1:{self.port}"),
            *("--rdzv-id", "elastic"),
            *("--rdzv-conf", ",".join(rendezvous_settings)),
            *("--local-addr", "127.0.0.1"),
            *(WORKER, str(self.folder), str(SECONDS_PER_STEP)),
            *self.command_line(),
        ]
        with open(self.folder / f"{name}.log", "a") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )

    def command_line(self):
        """The training that each worker runs."""
        settings = small_run(
            data__data_dir=self.digits,
            output_dir=self.run_folder,
            train__epochs=EPOCHS,
            train__global_batch_size=64,
            checkpoint__interval_steps=5,
            distributed__timeout_s=120,
        )
        return ["train", *settings]

    def kill(self, name):
        """SIGKILL to the agent alone: its workers are orphans then."""
        self.running.pop(name).kill()

    def terminate(self, name):
        """SIGTERM to an agent, which passes it on to its workers, as before a preemption."""
        agent = self.running.pop(name)
        agent.terminate()
        agent.wait(120)

    def wait_for_steps(self, more):
        """Until the run has logged `more` steps than now."""
        deadline = time.monotonic() + 300
        goal = last_logged_step(self.run_folder) + more
        while last_logged_step(self.run_folder) < goal:
            ended = [name for name, agent in self.running.items() if agent.poll() is not None]
            assert ended == [], self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.1)

    def printed(self):
        """The end of what each agent has printed."""
        parts = []
        for path in self.folder.glob("*.log"):
            end = path.read_text()[-3000:]
            parts.append(f"== {path.name}\n{end}")
        return "\n".join(parts)

    def orphans(self):
        """Processes of workers that still live, though their agent is gone."""
        alive = [agent.pid for agent in self.running.values() if agent.poll() is None]
        found = []
        for line in (self.folder / "pids").read_text().splitlines():
            agent_pid, worker_pid = map(int, line.split())
            if agent_pid not in alive and is_worker(worker_pid):
                found.append(worker_pid)
        return found

    def stop(self):
        for agent in self.running.values():
            if agent.poll() is None:
                agent.terminate()
        for agent in self.running.values():
            agent.wait(60)


def is_worker(pid):
    """Whether a process is there that runs the worker."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "worker.py" in command


@pytest.mark.long
def test_an_agent_dies_and_another_joins(digits, tmp_path):
    """64 images on 4, 3 (two train, one is a spare) and 4 ranks, then 3 after a signal: same
    samples, crops and learning rates of each step, every line of the log once, no orphan.

    The signal costs no step.
    """
    agents = Agents(tmp_path, digits)
    try:
        agents.start("host", 2)
        agents.start("first", 1)
        agents.start("second", 1)
        agents.wait_for_steps(6 + random.Random(0).randrange(4))
        agents.kill("second")
        agents.wait_for_steps(10)
        assert agents.orphans() == []
        agents.start("second", 1)
        agents.wait_for_steps(40)
        agents.terminate("first")
        agents.wait_for_steps(10)
        codes = [agent.wait(300) for agent in agents.running.values()]
    finally:
        agents.stop()
    assert set(codes) == {0}, (codes, agents.printed())

    logs = [path.read_text() for path in tmp_path.glob("*.log")]
    printed = "".join(logs)
    assert "Traceback" not in printed
    assert "64 does not divide by 3 ranks: 2 of them train, 1 wait as spares" in printed
    for ranks in (4, 2):
        assert f"batch 64 = {ranks} cpu ranks" in printed
    stops = re.findall(r"stopped at step (\d+) of", printed)
    assert stops, printed[-3000:]
    for stopped in stops:
        assert f"; step {stopped}, from " in printed

    lines = logged_lines(agents.run_folder)
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained == list(range(1, STEPS + 1))
    evaluated = [line["step"] for line in lines if "val/top1" in line]
    assert evaluated == sorted(set(evaluated))
    assert evaluated[-1] == STEPS

    steps = by_step(tmp_path)
    batch_sizes = [len(samples) for _, samples in steps.values()]
    assert batch_sizes == [64] * STEPS
    assert steps_of_one_rank(tmp_path, digits) == steps


def steps_of_one_rank(folder, digits):
    """The same run, undisturbed and alone."""
    alone = folder / "alone"
    alone.mkdir()
    agents = Agents(alone, digits)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agents.port),
    }
    seconds_per_step = 0
    done = subprocess.run(
        [sys.executable, WORKER, str(alone), str(seconds_per_step), *agents.command_line()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return by_step(alone)
