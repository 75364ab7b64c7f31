"""Throw seeded faults at a small real training run. In the end everything must equal the
undisturbed run, bit for bit.

    make chaos                                  # 200 faults, a log, a summary
    python tests/chaos/chaos.py --faults 50 --seed 7 --folder /tmp/chaos

One round is one run on two ranks (a small ResNet, the embedded digits, fp32, averaged weights). It
is disturbed by its share of the faults, one in each attempt, and then left to finish. After every
fault it is started again, as a launcher would do.
"""

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from dist_utils import (
    TINY_NETWORK,
    by_step,
    equal_trees,
    in_double,
    last_checkpoint,
    last_logged_step,
    logged_lines,
    record_batches,
    run_app,
    run_to_the_end,
    saved_steps,
    slow_from,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
    without_clock,
)
from faults import (
    EPOCHS,
    FAULTS,
    FILE_FAULTS,
    RANKS,
    SIGNALS,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Fault,
    damage_files,
    good_checkpoints,
    latest_step,
    rank_main,
)

# Imported before the ranks are forked, so that none of them has to do it.
import resnet_dist.run  # noqa: F401
from resnet_dist.distributed.watchdog import EXIT_LOST_RANK

STOP_TIMEOUT_SECONDS = 12.0
"""distributed.timeout_s of an attempt in which a rank is stopped."""


def arguments(digits: str, folder: Path, **more: object) -> list[str]:
    """The command line of a run of three epochs with twelve steps each. It saves a checkpoint every
    five steps and at the end of each epoch, and evaluates each epoch.

    Args:
        digits: the data folder.
        folder: the run's folder.
        more: further settings, with `__` for the dot: `optim__base_lr=0.05`.
    """
    settings = {
        "data__data_dir": digits,
        "output_dir": folder,
        "model__name": TINY_NETWORK,
        "train__epochs": EPOCHS,
        "train__ema_decay": 0.9,
        "train__eval_interval_epochs": 1,
        "checkpoint__interval_steps": 5,
        "checkpoint__interval_epochs": 1,
    }
    return ["train", *small_run(**(settings | more))]


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint file."""
    return max(saved_steps(folder), default=0)


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """The parts in which two finished runs differ."""
    state = last_checkpoint(folder)
    expected = last_checkpoint(undisturbed)
    found = []
    for part in ("step", "model", "ema", "optimizer", "scaler", "best_top1", "best_step"):
        if not equal_trees(state[part], expected[part]):
            found.append(part)
    lines = without_clock(logged_lines(folder))
    if lines != without_clock(logged_lines(undisturbed)):
        found.append("metrics")
    return found


class Round:
    """One run and the faults that are thrown at it.

    Attributes:
        thrown: the titles of the faults.
        lost: for each new start, the number of steps that had to be done again.
        seconds: for each fault, the time until the first new step was logged.
    """

    def __init__(self, digits: str, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.digits = digits
        self.folder = folder
        self.say = say
        self.random = random.Random(seed)
        self.thrown: list[str] = []
        self.lost: list[int] = []
        self.seconds: list[float] = []
        # The last fault: its time, the step that was logged then, and whether a new start has
        # said from where it resumes. The time is None once a new step was logged.
        self.fault_time: float | None = None
        self.fault_step = 0
        self.resumed = True
        self.damaged: set[str] = set()
        folder.mkdir(parents=True)

    def play(self, kinds: list[str]) -> list[str]:
        """Throw the faults, one in each attempt, and let the run finish.

        Returns:
            The kinds that found no place before the end of the run: they are for the next round.
        """
        remaining = list(kinds)
        self.throw_possible(remaining)
        self.finish()
        if remaining and all(kind in FILE_FAULTS for kind in remaining):
            # The finished run has enough checkpoints to damage one.
            self.throw_possible(remaining)
            self.finish()
        return remaining

    def throw_possible(self, remaining: list[str]) -> None:
        """Throw faults, the first possible one each time, and remove them from the list."""
        while True:
            possible = [kind for kind in remaining if self.is_possible(kind)]
            if not possible:
                return
            kind = possible[0]
            if kind in FILE_FAULTS:
                self.say(damage_files(kind, self.folder, self.random, self.damaged))
                self.thrown.append(kind)
            else:
                self.strike(self.draw_fault(kind, len(remaining)))
            remaining.remove(kind)

    def is_possible(self, kind: str) -> bool:
        """Whether a fault of this kind can strike now, before the run ends."""
        if kind == "leftovers":
            # A run claims its folder before it writes anything else there.
            return (self.folder / "checkpoints" / "attempt").exists()
        if kind in FILE_FAULTS:
            # At least one good checkpoint must be left.
            return len(good_checkpoints(self.folder, self.damaged)) >= 2
        return saved_step(self.folder) < latest_step(kind)

    def finish(self) -> None:
        """The last attempt: nothing disturbs it."""
        codes, _ = self.attempt()
        assert codes == [0] * RANKS, (codes, self.tail())

    def draw_fault(self, kind: str, remaining: int) -> Fault:
        """A fault at a random step. The steps that are left are shared by the `remaining` faults,
        so that each of them finds the run under way.
        """
        reached = saved_step(self.folder)
        latest = latest_step(kind)
        share = (latest - reached) // remaining
        ahead = self.random.randint(1, max(1, min(share, STEPS_PER_EPOCH)))
        return Fault(
            kind,
            at=min(latest, reached + ahead),
            victim=self.random.randrange(RANKS),
            signal_name=self.random.choice(SIGNALS),
            folder=self.folder,
        )

    def strike(self, fault: Fault) -> None:
        """One attempt that ends by the fault."""
        timeout = STOP_TIMEOUT_SECONDS if fault.kind == "stop one" else 60
        main = rank_main(fault)
        strikes_by_itself = main is not None and fault.kind != "disk full"
        if main is None:
            # The second run has to come before the first one ends.
            seconds = 8.0 if fault.kind == "second run" else 0.4
            main = slow_from(fault.at, seconds=seconds)
        codes, moment = self.attempt(main, None if strikes_by_itself else fault, timeout)
        self.thrown.append(fault.title)
        (self.folder / "full").unlink(missing_ok=True)
        assert codes == fault.expected_codes(), (fault, codes, self.tail())
        step = last_logged_step(self.folder)
        if fault.kind.startswith("signal"):
            assert saved_step(self.folder) == step, "a signal must not cost a step"
        self.fault_time = moment
        self.fault_step = step
        self.resumed = False
        self.say(f"{fault.title}, rank {fault.victim}, step {step}: exit codes {codes}")

    def attempt(
        self, main=None, fault: Fault | None = None, timeout: float = 60
    ) -> tuple[list[int], float]:
        """Start all ranks and wait until they end.

        Args:
            main: takes the place of the command line's main.
            fault: strikes from outside once its step is logged.
            timeout: the run's `distributed.timeout_s`.

        Returns:
            The exit codes, and the time of the fault (or of the end).
        """
        log = self.folder / "log"
        start_of_log = log.stat().st_size if log.exists() else 0
        words = arguments(self.digits, self.folder, distributed__timeout_s=timeout)
        processes = start_app(RANKS, words, str(log), main)
        moment = None
        deadline = time.monotonic() + 300
        alive = True
        while alive:
            assert time.monotonic() < deadline, self.tail()
            # Asked before the files are read: everything written until the end is then seen.
            alive = all(process.is_alive() for process in processes)
            first_step = self.first_step(start_of_log)
            if first_step is not None:
                self.note_progress(first_step)
                can_strike = fault is not None and alive and moment is None
                if can_strike and last_logged_step(self.folder) >= max(fault.at, first_step + 1):
                    moment = time.monotonic()
                    self.act(fault, processes)
            time.sleep(0.02)
        if moment is None:
            moment = time.monotonic()
        return wait_app(processes), moment

    def first_step(self, start_of_log: int) -> int | None:
        """The step from which the present attempt goes on, once it has said so."""
        log = self.folder / "log"
        if not log.exists():
            return None
        printed = log.read_bytes()[start_of_log:].decode(errors="replace")
        found = re.search(r"per epoch; step (\d+)", printed)
        return int(found[1]) if found else None

    def note_progress(self, first_step: int) -> None:
        """Measure what the last fault has cost."""
        if not self.resumed:
            self.resumed = True
            self.lost.append(self.fault_step - first_step)
        if self.fault_time is not None and last_logged_step(self.folder) > self.fault_step:
            self.seconds.append(time.monotonic() - self.fault_time)
            self.fault_time = None

    def act(self, fault: Fault, processes: list) -> None:
        """Strike the running processes from outside."""
        if fault.kind == "second run":
            self.supersede(processes)
            return
        if fault.kind == "disk full":
            self.wait_for_failed_save(processes)
        else:
            # Anywhere in a step.
            time.sleep(self.random.random() * 0.15)
        victim = processes[fault.victim]
        if fault.kind == "kill one":
            victim.kill()
        elif fault.kind in ("kill all", "disk full"):
            for process in processes:
                process.kill()
        elif fault.kind == "signal one":
            os.kill(victim.pid, signal.Signals[fault.signal_name])
        elif fault.kind == "signal all":
            for process in processes:
                os.kill(process.pid, signal.Signals[fault.signal_name])
        elif fault.kind == "stop one":
            self.stop(victim, [process for process in processes if process is not victim])

    def wait_for_failed_save(self, processes: list) -> None:
        """Until the main process has reported a failed save."""
        while not (self.folder / "full").exists():
            assert all(process.is_alive() for process in processes), self.tail()
            time.sleep(0.005)

    def stop(self, victim, others: list) -> None:
        """Stop one process: the others have to leave. Then kill it, as torchrun and SLURM do."""
        os.kill(victim.pid, signal.SIGSTOP)
        assert wait_app(others) == [EXIT_LOST_RANK] * len(others), self.tail()
        victim.kill()

    def supersede(self, processes: list) -> None:
        """Start the same run a second time. The first one has to leave; then the second one is
        killed.
        """
        second = start_app(
            RANKS,
            arguments(self.digits, self.folder),
            str(self.folder / "log"),
            slow_from(TOTAL_STEPS - 3),
        )
        deadline = time.monotonic() + 120
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.02)
        for process in second:
            process.kill()
        wait_app(second)

    def tail(self) -> str:
        """The end of what the run has printed."""
        return (self.folder / "log").read_text(errors="replace")[-3000:]


def other_ranks(digits: str, folder: Path, seed: int) -> float:
    """Compare a run on two ranks with one that is killed twice and continues on three ranks and on
    one. Both run in double precision: in single precision, rounding changes the signs of a constant
    background before a ReLU.

    Returns:
        The relative difference of the weights.

    Raises:
        AssertionError: a step had other samples, crops or another learning rate.
    """
    generator = random.Random(seed)
    two = folder / "two"
    mixed = folder / "mixed"
    for place in (two, mixed):
        place.mkdir(parents=True)
    finish_in_double(2, digits, two)
    for ranks, at in ((2, generator.randint(6, 8)), (3, generator.randint(13, 17))):
        kill_in_double(ranks, at, digits, mixed)
    finish_in_double(1, digits, mixed)

    expected = by_step(two)
    assert len(expected) == 2 * STEPS_PER_EPOCH
    for _, samples in expected.values():
        assert len(samples) == 120
    assert by_step(mixed) == expected
    weights_of_two = float_weights(two)
    difference = weights_of_two - float_weights(mixed)
    return (difference.norm() / weights_of_two.norm()).item()


def short_arguments(digits: str, folder: Path) -> list[str]:
    """The run of `other_ranks`: two epochs."""
    return arguments(
        digits,
        folder,
        train__epochs=2,
        optim__base_lr=0.05,
    )


def finish_in_double(ranks: int, digits: str, folder: Path) -> None:
    """Run to the end, and record the batches."""
    main = in_double(record_batches(folder))
    run_to_the_end(ranks, short_arguments(digits, folder), folder, main)


def kill_in_double(ranks: int, at: int, digits: str, folder: Path) -> None:
    """Run until step `at` is logged, record the batches, then kill all ranks."""
    main = slow_from(at, in_double(record_batches(folder)))
    log = folder / "log"
    processes = start_app(ranks, short_arguments(digits, folder), str(log), main)
    wait_for_step(folder, at, processes, saved=at - 5)
    for process in processes:
        process.kill()
    wait_app(processes)


def float_weights(folder: Path) -> torch.Tensor:
    """All floating-point values of a run's final model as one vector in double precision."""
    vectors = []
    for tensor in last_checkpoint(folder)["model"].values():
        if tensor.is_floating_point():
            vectors.append(tensor.double().flatten())
    return torch.cat(vectors)


def draw(number: int, seed: int) -> list[str]:
    """The kinds of `number` faults in random order, every kind as often as any other."""
    generator = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < number:
        kinds += generator.sample(FAULTS, len(FAULTS))
    return kinds[:number]


class Log:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self.start
        print(f"{seconds:7.1f} s  {text}", flush=True)


def run_undisturbed(digits: str, folder: Path) -> None:
    """The run to compare with."""
    folder.mkdir(parents=True)
    log = folder / "log"
    codes = run_app(RANKS, arguments(digits, folder), str(log), timeout=300)
    assert codes == [0] * RANKS, log.read_text()


def summarize(rounds: list[Round], say: Callable[[str], None]) -> None:
    """Say what was thrown and what it cost."""
    thrown = []
    lost = []
    seconds = []
    for one in rounds:
        # "signal one SIGTERM" is of the kind "signal one".
        thrown += [title.partition(" SIG")[0] for title in one.thrown]
        lost += one.lost
        seconds += one.seconds
    counts = [f"{thrown.count(kind)} x {kind}" for kind in FAULTS]
    say(f"faults thrown: {', '.join(counts)}")
    say(f"{len(thrown)} faults in {len(rounds)} runs, {len(lost)} new starts")
    if lost:
        say(f"steps lost: {sum(lost)}, median {statistics.median(lost):g}, worst {max(lost)}")
    if seconds:
        median = statistics.median(seconds)
        worst = max(seconds)
        say(f"seconds from a fault to the next new step: median {median:.1f}, worst {worst:.1f}")


def parse_options() -> argparse.Namespace:
    """The options of the long form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument(
        "--per_round", type=int, default=10, help="at most so many faults in one run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a new temporary folder")
    return parser.parse_args()


def main() -> int:
    """The long form: many rounds, and one run whose number of ranks changes."""
    options = parse_options()
    # A run that nohup starts ignores SIGHUP, which is one of the faults.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    place = options.folder
    if place is None:
        place = Path(tempfile.mkdtemp(prefix="chaos."))
    digits = str(place / "digits")
    round_folders = place / "rounds"
    shutil.rmtree(round_folders, ignore_errors=True)
    undisturbed = round_folders / "undisturbed"
    say = Log()
    run_undisturbed(digits, undisturbed)
    say(f"the undisturbed run is done: {TOTAL_STEPS} steps")
    kinds = draw(options.faults, options.seed)
    rounds: list[Round] = []
    different: list[int] = []
    while kinds:
        number = len(rounds)
        folder = round_folders / f"{number:03d}"
        one = Round(digits, folder, seed=options.seed * 1000 + number, say=say)
        of_this_round = kinds[: options.per_round]
        of_later_rounds = kinds[options.per_round :]
        left_over = one.play(of_this_round)
        kinds = left_over + of_later_rounds
        rounds.append(one)
        found = differences(folder, undisturbed)
        if found:
            different.append(number)
            say(f"round {number}: {len(one.thrown)} faults; differs in {found}, see {folder}")
        else:
            shutil.rmtree(folder)
            say(f"round {number}: {len(one.thrown)} faults; equal, bit for bit")

    difference = other_ranks(digits, round_folders / "ranks", options.seed)
    say("2 ranks, killed, 3 ranks, killed, 1 rank: the same samples, crops and learning rates")
    say(f"the weights differ by {difference:.1e}")
    summarize(rounds, say)
    if different:
        say(f"rounds that differ: {different}")
        return 1
    say("all runs equal the undisturbed one, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
