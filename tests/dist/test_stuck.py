"""One rank is killed, stopped, stuck or raises alone: the others say which one and where, and end.
Rows of the table of faults; that a new start goes on bit for bit is shown by test_exactness.py and
tests/chaos.
"""

import os
import re
import signal
import time

import pytest
import torch
from dist_utils import TINY_NETWORK, options, small_run, start_app, wait_app, wait_for_step

from resnet_dist import cli, engine
from resnet_dist.distributed import runtime as distributed
from resnet_dist.distributed import watchdog
from resnet_dist.distributed.watchdog import EXIT_LOST_RANK

SMALL = small_run(
    model__name=TINY_NETWORK,
    train__epochs=20,
    checkpoint__interval_steps=5,
    distributed__timeout_s=600,
)


# a busy machine must be able to start within it
LIMIT = ["--distributed.timeout_s", "12"]
WAITED = "10.2 s"  # 0.85 of it


def start(digits, folder, *more, entry=None, world_size=3):
    return start_app(
        world_size,
        [
            "train",
            *options(config="configs/quickstart.yaml", data__data_dir=digits, output_dir=folder),
            *SMALL,
            *more,
        ],
        str(folder / "log"),
        entry,
    )


def at_step_3(number, action, afterwards=lambda: None):
    """The command line's main; in one rank `action()` takes the place of step 3's update."""

    def entry(arguments):
        real, rank = engine.train_step, os.environ["RANK"]
        watchdog._GRACE_SECONDS = 1.0

        def train_step(model, state, *rest):
            if rank == str(number) and state.step == 3:
                action()
            return real(model, state, *rest)

        engine.train_step = train_step
        code = cli.main(arguments)
        if rank == str(number):
            afterwards()
        return code

    return entry


def errors(folder):
    """The lines that speak of an error, without their colour: none of them a traceback's."""
    printed = (folder / "log").read_text()
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_any_rank(digits, tmp_path, victim):
    """The others end at once, in a sentence instead of the tracebacks of a broken connection."""
    processes = start(digits, tmp_path, *LIMIT)
    wait_for_step(tmp_path, 3, processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    assert wait_app(processes) == [
        -signal.SIGKILL if rank == victim else EXIT_LOST_RANK for rank in range(3)
    ]
    for line in (found := errors(tmp_path)):
        assert re.match(r"error \(rank \d\): lost at step \d+ \(\w+\): ", line)
        assert (
            f"rank {victim} (host {os.uname().nodename}, process {processes[victim].pid})" in line
        )
    assert 1 <= len(found) <= 2  # two where what they know of it differs


def test_a_rank_that_is_stopped(digits, tmp_path):
    """SIGSTOP, also of the rank that keeps the store: which rank, which step, its state and last
    stack.
    """
    runs = []
    for victim in (0, 1):  # two runs, which wait at the same time
        folder = tmp_path / str(victim)
        folder.mkdir()
        runs.append((victim, folder, start(digits, folder, *LIMIT)))
    try:
        for victim, folder, processes in runs:
            wait_for_step(folder, 3, processes)
            os.kill(processes[victim].pid, signal.SIGSTOP)
        for victim, _, processes in runs:
            assert wait_app(processes[:victim] + processes[victim + 1 :]) == [
                EXIT_LOST_RANK,
                EXIT_LOST_RANK,
            ]
    finally:
        for victim, _, processes in runs:
            processes[victim].kill()
    for victim, folder, processes in runs:
        assert errors(folder)
        for line in errors(folder):
            assert re.search(rf"waited {WAITED} at step \d+ \(\w+\) for rank ", line)
            process = f"host {os.uname().nodename}, process {processes[victim].pid}"
            assert f"rank {victim} ({process}), T (stopped), " in line
            assert re.search(r"last heard of at step \d+ \(\w+\) in \S+\.py:\d+ ", line)


def test_a_rank_that_is_stuck(digits, tmp_path):
    """Its process lives and its main thread is somewhere: the others say where, and it ends as
    well.
    """

    def sleep_while_waiting_for_data():
        engine.TrainState.step = property(lambda state: state.__dict__["step"], stuck)

    def stuck(state, value):
        state.__dict__["step"] = value
        if value == 4:
            time.sleep(600)

    processes = start(digits, tmp_path, *LIMIT, entry=at_step_3(1, sleep_while_waiting_for_data))
    assert wait_app(processes) == [EXIT_LOST_RANK] * 3
    assert errors(tmp_path)
    for line in errors(tmp_path):
        assert "rank 1 (host " in line and "stuck < " in line
        assert "rank 0 (host" not in line and "rank 2 (host" not in line


def broken_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_rank_that_raises_alone(digits, tmp_path):
    """Uneven progress: its traceback is the only one, and the others take its code."""
    assert wait_app(start(digits, tmp_path, entry=at_step_3(1, broken_device))) == [1, 1, 1]
    printed = (tmp_path / "log").read_text()
    assert printed.count("Traceback") == 1 and printed.count("error (rank") == 1, printed
    assert "error (rank 1): Traceback" in printed and "illegal memory access" in printed


def test_a_rank_that_raises_while_the_others_notice_nothing(digits, tmp_path):
    """With NCCL no connection breaks: here the process stays. The others find its error, and leave
    with its code.
    """

    def refuse():
        raise ValueError("data.max_bad_images is 0 and there is one")

    entry = at_step_3(1, refuse, afterwards=lambda: time.sleep(600))
    processes = start(digits, tmp_path, entry=entry)
    assert wait_app([processes[0], processes[2]]) == [2, 2]
    processes[1].kill()
    assert errors(tmp_path) == ["error (rank 1): data.max_bad_images is 0 and there is one"]


def test_a_wait_that_all_share_is_none(digits, tmp_path):
    """Storage that stalls for all ranks, for longer than the limit: nobody waits for another, and
    nothing happens.
    """

    def entry(arguments):
        real = engine.train_step

        def train_step(model, state, *rest):
            if state.step == 2:
                time.sleep(8.5)
            return real(model, state, *rest)

        engine.train_step = train_step
        return cli.main(arguments)

    more = (*options(distributed__timeout_s=8, train__epochs=0.5, schedule__warmup_epochs=0),)
    assert wait_app(start(digits, tmp_path, *more, entry=entry)) == [0, 0, 0], (
        tmp_path / "log"
    ).read_text()


def test_the_headline_comes_before_what_hangs(digits, tmp_path):
    """As with a device that waits for a lost rank: the loader cannot be closed. The failure is
    printed first, and the process ends all the same.
    """

    def entry(arguments):
        from resnet_dist.data.pixels.loader import DaliTrainLoader

        real = DaliTrainLoader.batches
        watchdog._LEAVE_SECONDS = 3.0

        def batches(self, *steps):
            try:
                yield from real(self, *steps)
            finally:
                (tmp_path / f"hangs_{os.environ['RANK']}").touch()
                time.sleep(600)

        DaliTrainLoader.batches = batches
        return at_step_3(1, out_of_memory)(arguments)

    assert wait_app(start(digits, tmp_path, entry=entry)) == [2, 2, 2]
    assert (tmp_path / "hangs_1").exists()
    assert "error (rank 1): rank 1 is out of GPU memory" in (tmp_path / "log").read_text()


def test_a_rank_that_is_lost_while_another_waits_in_a_kernel(digits, tmp_path):
    """As with NCCL, the rank that waits gets no error: the watchdog names the lost one and ends the
    process long before the time-out.
    """

    def entry(arguments):
        rank = os.environ["RANK"]
        watchdog._LOST_PEER_SECONDS = 1.0
        real_start = distributed.start

        def start(*arguments):
            runtime = real_start(*arguments)
            runtime.watchdog.waits_forever = True
            return runtime

        distributed.start = start
        action = os._exit if rank == "1" else time.sleep
        return at_step_3(int(rank), lambda: action(9))(arguments)

    processes = start(digits, tmp_path, entry=entry, world_size=2)
    assert wait_app(processes) == [EXIT_LOST_RANK, 9]
    (line,) = errors(tmp_path)
    name = f"rank 1 (host {os.uname().nodename}, process {processes[1].pid}), "
    assert line.startswith("error (rank 0): lost at step 3 (update): " + name)
