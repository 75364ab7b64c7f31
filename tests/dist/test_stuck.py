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

LIMIT_SECONDS = 12
# 0.85 of it.
WAITED = "10.2 s"


def start(digits, folder, *more, entry=None, world_size=3):
    """Start all ranks of a training, which print to `folder / "log"`."""
    own = options(
        config="configs/quickstart.yaml",
        data__data_dir=digits,
        output_dir=folder,
    )
    words = ["train", *own, *SMALL, *more]
    return start_app(world_size, words, str(folder / "log"), entry)


def do_nothing():
    pass


def limited(arguments):
    """The command line's main, where a rank waits WAITED for another from step 1 on. Before, many
    ranks may start slowly on a busy machine.
    """
    real_beat = watchdog.Watchdog.beat

    def beat(self, step, phase):
        if step == 1:
            self.timeout_s = LIMIT_SECONDS
            self.interval = LIMIT_SECONDS / 25
        real_beat(self, step, phase)

    watchdog.Watchdog.beat = beat
    return cli.main(arguments)


def at_step_3(number, action, afterwards=do_nothing):
    """The command line's main; in one rank `action()` takes the place of step 3's update."""

    def entry(arguments):
        real_step = engine.train_step
        is_chosen = os.environ["RANK"] == str(number)
        watchdog._GRACE_SECONDS = 1.0

        def train_step(model, state, *rest):
            if is_chosen and state.step == 3:
                action()
            return real_step(model, state, *rest)

        engine.train_step = train_step
        code = cli.main(arguments)
        if is_chosen:
            afterwards()
        return code

    return entry


def errors(folder):
    """The lines that speak of an error, without their colour: none of them a traceback's."""
    printed = (folder / "log").read_text()
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if line.startswith("error")]


def place_of(process):
    """How the errors name the place of a process."""
    return f"host {os.uname().nodename}, process {process.pid}"


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_any_rank(digits, tmp_path, victim):
    """The others end at once, in a sentence instead of the tracebacks of a broken connection."""
    processes = start(digits, tmp_path)
    wait_for_step(tmp_path, 3, processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    expected = [EXIT_LOST_RANK] * 3
    expected[victim] = -signal.SIGKILL
    assert wait_app(processes) == expected

    # One line, or two where what the others know of it differs.
    lines = errors(tmp_path)
    assert len(lines) in (1, 2)
    place = place_of(processes[victim])
    for line in lines:
        assert re.match(r"error \(rank \d\): lost at step \d+ \(\w+\): ", line)
        assert f"rank {victim} ({place})" in line


def test_a_rank_that_is_stopped(digits, tmp_path):
    """SIGSTOP, also of the rank that keeps the store: which rank, which step, its state and last
    stack.
    """
    # Two runs, which wait at the same time. The number of the rank that is stopped is their name.
    folders = [tmp_path / "0", tmp_path / "1"]
    runs = []
    for folder in folders:
        folder.mkdir()
        runs.append(start(digits, folder, entry=limited))
    try:
        for victim, processes in enumerate(runs):
            wait_for_step(folders[victim], 3, processes)
            os.kill(processes[victim].pid, signal.SIGSTOP)
        for victim, processes in enumerate(runs):
            others = processes[:victim] + processes[victim + 1 :]
            assert wait_app(others) == [EXIT_LOST_RANK] * 2
    finally:
        for victim, processes in enumerate(runs):
            processes[victim].kill()

    for victim, processes in enumerate(runs):
        lines = errors(folders[victim])
        assert lines
        place = place_of(processes[victim])
        for line in lines:
            assert re.search(rf"waited {WAITED} at step \d+ \(\w+\) for rank ", line)
            assert f"rank {victim} ({place}), T (stopped), " in line
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

    entry = at_step_3(1, sleep_while_waiting_for_data)
    limit = options(distributed__timeout_s=LIMIT_SECONDS)
    processes = start(digits, tmp_path, *limit, entry=entry)
    assert wait_app(processes) == [EXIT_LOST_RANK] * 3
    lines = errors(tmp_path)
    assert lines
    for line in lines:
        # The watchdog reports before a collective times out.
        assert f"waited {WAITED} " in line
        assert "rank 1 (host " in line
        assert "stuck < " in line
        assert "rank 0 (host" not in line
        assert "rank 2 (host" not in line


def broken_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_rank_that_raises_alone(digits, tmp_path):
    """Uneven progress: its traceback is the only one, and the others take its code."""
    processes = start(digits, tmp_path, entry=at_step_3(1, broken_device))
    assert wait_app(processes) == [1, 1, 1]
    printed = (tmp_path / "log").read_text()
    assert printed.count("Traceback") == 1, printed
    assert printed.count("error (rank") == 1, printed
    assert "error (rank 1): Traceback" in printed
    assert "illegal memory access" in printed


def test_a_rank_that_raises_while_the_others_notice_nothing(digits, tmp_path):
    """With NCCL no connection breaks: here the process stays. The others find its error, and leave
    with its code.
    """

    def refuse():
        raise ValueError("data.max_bad_images is 0 and there is one")

    def stay():
        time.sleep(600)

    entry = at_step_3(1, refuse, afterwards=stay)
    first, refusing, third = start(digits, tmp_path, entry=entry)
    assert wait_app([first, third]) == [2, 2]
    refusing.kill()
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

    more = options(
        distributed__timeout_s=8,
        train__epochs=0.5,
        schedule__warmup_epochs=0,
    )
    processes = start(digits, tmp_path, *more, entry=entry)
    codes = wait_app(processes)
    assert codes == [0, 0, 0], (tmp_path / "log").read_text()


def test_the_headline_comes_before_what_hangs(digits, tmp_path):
    """As with a device that waits for a lost rank: the loader cannot be closed. The failure is
    printed first, and the process ends all the same.
    """

    def entry(arguments):
        from resnet_dist.data.pixels.loader import DaliTrainLoader

        real_batches = DaliTrainLoader.batches
        rank = os.environ["RANK"]
        watchdog._LEAVE_SECONDS = 3.0

        def batches_that_cannot_be_closed(self, *steps):
            try:
                yield from real_batches(self, *steps)
            finally:
                (tmp_path / f"hangs_{rank}").touch()
                time.sleep(600)

        DaliTrainLoader.batches = batches_that_cannot_be_closed
        main = at_step_3(1, out_of_memory)
        return main(arguments)

    processes = start(digits, tmp_path, entry=entry)
    assert wait_app(processes) == [2, 2, 2]
    assert (tmp_path / "hangs_1").exists()
    printed = (tmp_path / "log").read_text()
    assert "error (rank 1): rank 1 is out of GPU memory" in printed


def test_a_rank_that_is_lost_while_another_waits_in_a_kernel(digits, tmp_path):
    """As with NCCL, the rank that waits gets no error: the watchdog names the lost one and ends the
    process long before the time-out.
    """

    def entry(arguments):
        rank = int(os.environ["RANK"])
        watchdog._LOST_PEER_SECONDS = 1.0
        real_start = distributed.start

        def start_waiting_for_ever(*arguments):
            runtime = real_start(*arguments)
            runtime.watchdog.waits_forever = True
            return runtime

        def wait_or_be_lost():
            if rank == 1:
                os._exit(9)
            time.sleep(9)

        distributed.start = start_waiting_for_ever
        main = at_step_3(rank, wait_or_be_lost)
        return main(arguments)

    processes = start(digits, tmp_path, entry=entry, world_size=2)
    assert wait_app(processes) == [EXIT_LOST_RANK, 9]
    [line] = errors(tmp_path)
    place = place_of(processes[1])
    assert line.startswith(f"error (rank 0): lost at step 3 (update): rank 1 ({place}), ")
