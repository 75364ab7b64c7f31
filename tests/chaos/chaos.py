"""Seeded faults thrown at a small real training run; in the end everything equals the undisturbed
run, bit for bit.

    make chaos                                  # 200 faults, a log, a summary python
    tests/chaos/chaos.py --faults 50 --seed 7 --folder /tmp/chaos

One round is one run on two ranks (ResNet-20, real digits, fp32, with an average), disturbed until
it has met its share of the faults and then left to finish. After every fault it is started again,
as a launcher would.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from dist_utils import (
    by_step,
    equal_trees,
    in_double,
    record_batches,
    run_app,
    slow_from,
    start_app,
    wait_app,
    wait_for_step,
)

from resnet_dist import checkpoint, cli, engine
from resnet_dist.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.watchdog import EXIT_LOST_RANK

ROOT = Path(__file__).resolve().parents[2]
RANKS, EPOCHS, STEPS_PER_EPOCH = 2, 3, 12
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH
STOP_TIMEOUT = 12.0  # distributed.timeout_s where a rank is stopped
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SPOILS = ("flip newest", "flip a lone one", "truncate newest", "empty newest", "leftovers")
FAULTS = (
    "kill one",
    "kill all",
    "kill in checkpoint",
    "kill in evaluation",
    "kill at epoch",
    "signal one",
    "signal all",
    "stop one",
    "raise alone",
    "disk full",
    "disk full and freed",
    "kill before link",
    "second run",
    *SPOILS,
)
"""What can happen; the spoils happen to the files, between two attempts."""
CLOCK = {
    "time",
    "elapsed",
    "train/images_per_second",
    "train/data_wait_fraction",
    "train/step_seconds",
    "ranks/data_seconds",
    "ranks/step_seconds",
}


def arguments(digits: str, folder: Path, *more: str) -> list[str]:
    """A run of three epochs of twelve steps; a checkpoint every five steps and at each epoch, which
    is evaluated.
    """
    return [
        "train",
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        "--data.data_dir",
        digits,
        "--output_dir",
        str(folder),
        "--data.train_crop_size",
        "8",
        "--data.val_resize_size",
        "8",
        "--data.val_crop_size",
        "8",
        "--train.epochs",
        str(EPOCHS),
        "--train.global_batch_size",
        "120",
        "--train.precision",
        "fp32",
        "--train.ema_decay",
        "0.9",
        "--train.eval_interval_epochs",
        "1",
        "--checkpoint.interval_steps",
        "5",
        "--checkpoint.interval_epochs",
        "1",
        "--log.interval_steps",
        "1",
        "--distributed.timeout_s",
        "60",
        "--log.wandb",
        "disabled",
        "--distributed.threads",
        "1",
        "--data.threads",
        "1",
        *more,
    ]


def metrics(folder: Path) -> list[dict]:
    """What the run has logged, without the parts that depend on the clock."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in whole]


def last_step(folder: Path) -> int:
    """The newest step that the run has logged."""
    lines = metrics(folder)
    return lines[-1]["step"] if lines else 0


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint file."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*.pt"))
    return int(re.search(r"\d+", names[-1]).group()) if names else 0


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """The parts in which two finished runs differ."""
    left, right = (
        unpack_checkpoint(read_checkpoint(place / "checkpoints/last.pt"), "last.pt")
        for place in (folder, undisturbed)
    )
    parts = ("step", "model", "ema", "optimizer", "scaler", "best_top1", "best_step")
    found = [part for part in parts if not equal_trees(left[part], right[part])]
    return found + (["metrics"] if metrics(folder) != metrics(undisturbed) else [])


def expected_codes(fault: str, name: str, victim: int) -> list[int]:
    """The exit codes of all ranks after a fault; `name` is the signal's."""
    if fault.startswith("signal"):
        return [128 + signal.Signals[name]] * RANKS
    if fault == "raise alone":
        return [1] * RANKS
    if fault == "second run":
        return [2] * RANKS
    dead = [victim]
    if fault in ("kill all", "disk full"):
        dead = list(range(RANKS))
    elif fault in ("kill in checkpoint", "kill before link", "disk full and freed"):
        dead = [0]  # the main process writes
    return [-signal.SIGKILL if rank in dead else EXIT_LOST_RANK for rank in range(RANKS)]


class Round:
    """One run and what is done to it. `lost` and `seconds` are of each new start: the steps that
    were done again, and from the fault to the log line of the first step that is new.
    """

    def __init__(self, digits: str, folder: Path, seed: int, say) -> None:
        self.digits, self.folder, self.say = digits, folder, say
        self.random = random.Random(seed)
        self.lost: list[int] = []
        self.seconds: list[float] = []
        self.thrown: list[str] = []
        self.struck: tuple[float, int] | None = (
            None  # when the last fault struck, and the step that was reached
        )
        self.resumed = True
        self.spoiled: set[str] = set()
        folder.mkdir(parents=True)

    def play(self, faults: list[str]) -> None:
        """Throw the faults, one to an attempt, and let the run finish."""
        for number, fault in enumerate(faults):
            # Spread over the run, so that each finds it under way: what is left is shared by what
            # is still to come.
            reached = saved_step(self.folder)
            ahead = max(1, (TOTAL_STEPS - 2 - reached) // (len(faults) - number))
            at = min(TOTAL_STEPS - 2, reached + self.random.randint(1, max(1, min(ahead, 12))))
            self.strike(fault, at)
        codes, _ = self.attempt(None)
        assert codes == [0] * RANKS, (codes, self.tail())

    def strike(self, fault: str, at: int) -> None:
        """One attempt that ends by `fault` near step `at` (a fault of the files strikes after it
        was killed).
        """
        victim = self.random.randrange(RANKS)
        name = self.random.choice(SIGNALS)
        if fault in SPOILS:
            self.spoil(fault)
            self.thrown.append(fault)
            return
        entry = self.entry(fault, at, victim)
        more = ("--distributed.timeout_s", str(STOP_TIMEOUT)) if fault == "stop one" else ()

        def act(processes) -> None:
            if fault == "second run":
                self.supersede(processes)
                return
            pids = [process.pid for process in processes]
            if fault == "disk full":
                while not (
                    self.folder / "full"
                ).exists():  # the first save that failed was warned about
                    assert all(process.is_alive() for process in processes), self.tail()
                    time.sleep(0.005)
            else:
                time.sleep(self.random.random() * 0.15)  # anywhere in a step
            if fault == "kill one":
                os.kill(pids[victim], signal.SIGKILL)
            elif fault in ("kill all", "disk full"):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            elif fault.startswith("signal"):
                for pid in pids if fault == "signal all" else [pids[victim]]:
                    os.kill(pid, signal.Signals[name])
            elif fault == "stop one":
                os.kill(pids[victim], signal.SIGSTOP)
                others = [process for rank, process in enumerate(processes) if rank != victim]
                assert wait_app(others) == [EXIT_LOST_RANK] * len(others), self.tail()
                os.kill(
                    pids[victim], signal.SIGKILL
                )  # as torchrun and SLURM do with what does not go

        by_itself = entry is not None and fault != "disk full"
        # The second run has to come before the first one ends.
        seconds = 8.0 if fault == "second run" else 0.4
        entry = entry or slow_from(at, seconds=seconds)
        codes, moment = self.attempt(at, entry, None if by_itself else act, more)
        self.thrown.append(fault + (f" {name}" if fault.startswith("signal") else ""))
        (self.folder / "full").unlink(missing_ok=True)
        assert codes == expected_codes(fault, name, victim), (fault, codes, self.tail())
        if fault.startswith("signal"):
            assert saved_step(self.folder) == last_step(self.folder), "a signal costs no step"
        self.struck, self.resumed = (moment, last_step(self.folder)), False
        self.say(
            f"{self.thrown[-1]}, rank {victim}, step {last_step(self.folder)}: exit codes {codes}"
        )

    def supersede(self, processes) -> None:
        """Start the same run again while it is under way: the first one has to leave, and the
        second is killed.
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

    def attempt(
        self, at: int | None, entry=None, act=None, more: tuple = ()
    ) -> tuple[list[int], float]:
        """Start all ranks; `act` once step `at` is logged; the exit codes, and when the end began."""
        log = self.folder / "log"
        before = log.stat().st_size if log.exists() else 0
        processes = start_app(
            RANKS, arguments(self.digits, self.folder, *more), str(self.folder / "log"), entry
        )
        struck, moment = False, 0.0
        deadline, alive = time.monotonic() + 300, True
        while alive:
            assert time.monotonic() < deadline, self.tail()
            alive = all(
                process.is_alive() for process in processes
            )  # asked first: what they did is all read below
            begun = (
                re.search(r"per epoch; step (\d+)", log.read_text()[before:])
                if log.exists()
                else None
            )
            reached = last_step(self.folder) if begun else 0
            if self.struck and begun and not self.resumed:
                self.resumed = True
                self.lost.append(self.struck[1] - int(begun[1]))
            if self.struck and reached > self.struck[1]:
                self.seconds.append(time.monotonic() - self.struck[0])
                self.struck = None
            if act and alive and not struck and begun and reached >= max(at, int(begun[1]) + 1):
                struck, moment = True, time.monotonic()
                act(processes)
            time.sleep(0.02)
        moment = moment or time.monotonic()
        return wait_app(processes), moment

    def entry(self, fault: str, at: int, victim: int):
        """The command line's main with a fault inside, for those that strike at a certain place of
        the code.
        """
        folder = self.folder

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def changed(arguments):
            rank = int(os.environ["RANK"])
            step, evaluate, write = engine.train_step, engine.evaluate, checkpoint.write_checkpoint

            def train_step(model, state, *rest):
                if rank == victim and state.step >= at and fault == "raise alone":
                    raise MemoryError("out of memory, on this rank alone")
                result = step(model, state, *rest)
                if (
                    rank == victim
                    and fault == "kill at epoch"
                    and state.step >= at
                    and (state.step % STEPS_PER_EPOCH == 0)
                ):
                    die()
                return result

            def evaluation(model, loader, runtime, precision, poll):
                return evaluate(model, loader, runtime, precision, die if rank == victim else poll)

            def writing(path, content, *checks):
                if fault == "kill in checkpoint" and content["step"] >= at:
                    temporary = path.with_name(path.name + ".tmp")
                    temporary.write_bytes(b"PK" + bytes(50_000))  # half of it
                    die()
                if fault == "disk full" and content["step"] >= at:
                    raise OSError(28, "No space left on device")
                if fault == "disk full and freed" and content["step"] >= at:
                    if not full_at and content["step"] < TOTAL_STEPS - 6:
                        full_at.append(content["step"])
                    if content["step"] in full_at:
                        raise OSError(28, "No space left on device")
                    write(path, content, *checks)
                    die()
                write(path, content, *checks)

            def links(place, newest, *rest):
                if fault == "kill before link" and int(newest.stem.partition("_")[2]) >= at:
                    die()
                mend(place, newest, *rest)

            full_at: list[int] = []
            engine.train_step, checkpoint.write_checkpoint = train_step, writing
            mend, checkpoint.mend_links = checkpoint.mend_links, links
            if fault == "kill in evaluation":
                engine.evaluate = evaluation
            if fault == "disk full" and rank == 0:
                real = checkpoint.Saver.wait

                def wait(saver):
                    real(saver)
                    if saver.failure:
                        (folder / "full").touch()
                        time.sleep(300)  # until it is killed

                checkpoint.Saver.wait = wait
            return cli.main(arguments)

        inside = (
            "kill in checkpoint",
            "kill in evaluation",
            "kill at epoch",
            "raise alone",
            "disk full",
            "disk full and freed",
            "kill before link",
        )
        return changed if fault in inside else None

    def spoil(self, fault: str) -> None:
        """Do something to the files between two attempts."""
        files = sorted((self.folder / "checkpoints").glob("step_*.pt"))
        checkpoints = [path for path in files if str(path.stat()) not in self.spoiled]
        if fault == "leftovers" or len(checkpoints) < 2:  # one good one must be left
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            (self.folder / "checkpoints" / "step_00000099.pt.tmp").write_bytes(b"PK half")
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 9')
            return
        content = bytearray(checkpoints[-1].read_bytes())
        if fault == "flip a lone one":
            checkpoints[-1].with_name(checkpoints[-1].name + ".sha256").unlink(missing_ok=True)
        if fault.startswith("flip"):
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        elif fault == "truncate newest":
            del content[self.random.randrange(1, len(content)) :]
        else:
            content.clear()
        checkpoints[-1].write_bytes(content)
        self.spoiled.add(str(checkpoints[-1].stat()))
        self.say(f"{fault}: {checkpoints[-1].name}")

    def tail(self) -> str:
        """The end of what the run has printed."""
        return (self.folder / "log").read_text()[-3000:]


def other_ranks(digits: str, folder: Path, seed: int) -> float:
    """The run on two ranks, and one that is killed twice and goes on with three and with one:
    raises AssertionError unless each step had the same samples, crops and learning rate; returns
    the relative difference of the weights.

    In double precision: in single, rounding moves the signs of a constant background before a ReLU.
    """
    generator, places, more = (
        random.Random(seed),
        (folder / "two", folder / "mixed"),
        ("--optim.base_lr", "0.05"),
    )
    for place in places:
        place.mkdir(parents=True)
    two, mixed = places
    record = in_double(record_batches(two))
    assert run_app(2, arguments(digits, two, *more), str(two / "log"), record) == [0, 0], (
        two / "log"
    ).read_text()
    record = in_double(record_batches(mixed))
    for ranks, at in ((2, generator.randint(6, 12)), (3, generator.randint(18, 26))):
        processes = start_app(
            ranks, arguments(digits, mixed, *more), str(mixed / "log"), slow_from(at, record)
        )
        wait_for_step(mixed, at, processes, at - 5)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        wait_app(processes)
    assert run_app(1, arguments(digits, mixed, *more), str(mixed / "log"), record) == [0], (
        mixed / "log"
    ).read_text()
    ours, theirs = by_step(two), by_step(mixed)
    assert [len(samples) for _, samples in ours.values()] == [120] * TOTAL_STEPS and ours == theirs
    left, right = (
        torch.cat(
            [
                value.double().flatten()
                for value in unpack_checkpoint(read_checkpoint(place / "checkpoints/last.pt"), "")[
                    "model"
                ].values()
                if value.is_floating_point()
            ]
        )
        for place in places
    )
    return ((left - right).norm() / left.norm()).item()


def draw(number: int, seed: int) -> list[str]:
    """`number` faults: every kind as often as any other, shuffled."""
    generator = random.Random(seed)
    faults: list[str] = []
    while len(faults) < number:
        faults += generator.sample(FAULTS, len(FAULTS))
    return faults[:number]


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--per_round", type=int, default=10, help="faults of one run from scratch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = options.folder or Path(tempfile.mkdtemp(prefix="chaos."))
    shutil.rmtree(place / "rounds", ignore_errors=True)
    digits, undisturbed = str(place / "digits"), place / "rounds" / "undisturbed"
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {text}", flush=True)

    undisturbed.mkdir(parents=True)
    assert (
        run_app(RANKS, arguments(digits, undisturbed), str(undisturbed / "log"), timeout=300)
        == [0] * RANKS
    )
    say(f"the undisturbed run is done: {TOTAL_STEPS} steps")
    faults, rounds = draw(options.faults, options.seed), []
    for first in range(0, len(faults), options.per_round):
        one = Round(
            digits, place / "rounds" / f"{len(rounds):03d}", options.seed * 1000 + len(rounds), say
        )
        one.play(faults[first : first + options.per_round])
        rounds.append((one, differences(one.folder, undisturbed)))
        found = rounds[-1][1]
        outcome = f"differs in {found}" if found else "equal, bit for bit"
        say(f"round {len(rounds)}: {len(one.thrown)} faults; {outcome}")
        if not found:
            shutil.rmtree(one.folder)
    difference = other_ranks(digits, place / "rounds" / "ranks", options.seed)
    say(
        f"2 ranks, killed, 3 ranks, killed, 1 rank: the same samples, crops and lr; weights differ by {difference:.1e}"
    )
    lost = [steps for one, _ in rounds for steps in one.lost]
    seconds = [value for one, _ in rounds for value in one.seconds]
    thrown = [fault.partition(" SIG")[0] for one, _ in rounds for fault in one.thrown]
    different = [number for number, (_, found) in enumerate(rounds) if found]
    say("faults thrown: " + ", ".join(f"{thrown.count(kind)} x {kind}" for kind in FAULTS))
    say(f"{len(thrown)} faults in {len(rounds)} runs, {len(lost)} new starts")
    say(f"steps lost: {sum(lost)} in all, median {statistics.median(lost):g}, worst {max(lost)}")
    say(
        f"seconds from a fault to the next new step: median {statistics.median(seconds):.1f}, worst {max(seconds):.1f}"
    )
    say(
        f"runs that differ: {different}"
        if different
        else "all runs equal the undisturbed one, bit for bit"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
