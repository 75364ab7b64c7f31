"""The faults that chaos.py throws at a run: their kinds, where they strike, what they leave behind.

Three places where a fault can strike:

- from outside, by a signal to a running process (`Round.act` in chaos.py),
- inside a rank, at a certain place of the code (`rank_main`),
- in the files, between two attempts (`damage_files`).
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resnet_dist import cli, engine
from resnet_dist.checkpoints import checkpoint
from resnet_dist.distributed.watchdog import EXIT_LOST_RANK

RANKS = 2
STEPS_PER_EPOCH = 12
EPOCHS = 3
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
FILE_FAULTS = ("flip newest", "flip a lone one", "truncate newest", "empty newest", "leftovers")
FAULTS = (
    "kill one",
    "kill all",
    "kill in checkpoint",
    "kill in evaluation",
    "kill at epoch",
    "kill before link",
    "signal one",
    "signal all",
    "stop one",
    "raise alone",
    "disk full",
    "disk full and freed",
    "second run",
    *FILE_FAULTS,
)

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind: one of `FAULTS`.
        at: the step from which on it strikes.
        victim: the rank that it strikes, for the kinds that strike only one.
        signal_name: the signal, for "signal one" and "signal all".
        folder: the run's folder.
    """

    kind: str
    at: int
    victim: int
    signal_name: str
    folder: Path

    @property
    def title(self) -> str:
        """The kind, with the signal where there is one."""
        if self.kind.startswith("signal"):
            return f"{self.kind} {self.signal_name}"
        return self.kind

    def expected_codes(self) -> list[int]:
        """The exit codes of all ranks after the fault."""
        if self.kind.startswith("signal"):
            return [128 + signal.Signals[self.signal_name]] * RANKS
        if self.kind == "raise alone":
            return [1] * RANKS
        if self.kind == "second run":
            return [2] * RANKS
        killed = self.killed_ranks()
        return [-signal.SIGKILL if rank in killed else EXIT_LOST_RANK for rank in range(RANKS)]

    def killed_ranks(self) -> list[int]:
        """The ranks that end by SIGKILL."""
        if self.kind in ("kill all", "disk full"):
            return list(range(RANKS))
        if self.kind in ("kill in checkpoint", "kill before link", "disk full and freed"):
            # The main process writes the checkpoints.
            return [0]
        return [self.victim]


def rank_main(fault: Fault) -> Main | None:
    """The command line's main with the fault inside, or None for a fault from outside."""
    install = _INSTALL.get(fault.kind)
    if install is None:
        return None

    def main(arguments: list[str]) -> int:
        # This runs in a forked process: the functions are replaced for this rank alone.
        install(fault, int(os.environ["RANK"]))
        return cli.main(arguments)

    return main


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise_alone(fault: Fault, rank: int) -> None:
    """One rank raises an error in a training step."""
    real_step = engine.train_step

    def train_step(model, state, *rest):
        if rank == fault.victim and state.step >= fault.at:
            raise MemoryError("out of memory, on this rank alone")
        return real_step(model, state, *rest)

    engine.train_step = train_step


def _kill_at_epoch(fault: Fault, rank: int) -> None:
    """One rank is killed after the last step of an epoch."""
    real_step = engine.train_step

    def train_step(model, state, *rest):
        result = real_step(model, state, *rest)
        is_end_of_epoch = state.step % STEPS_PER_EPOCH == 0
        if rank == fault.victim and state.step >= fault.at and is_end_of_epoch:
            _die()
        return result

    engine.train_step = train_step


def _kill_in_evaluation(fault: Fault, rank: int) -> None:
    """One rank is killed after the first batch of an evaluation."""
    real_evaluate = engine.evaluate

    def evaluate(model, loader, runtime, precision, poll, *rest):
        if rank == fault.victim:
            poll = _die
        return real_evaluate(model, loader, runtime, precision, poll, *rest)

    engine.evaluate = evaluate


def _kill_in_checkpoint(fault: Fault, rank: int) -> None:
    """The main process is killed when half of the temporary file is written."""
    real_write = checkpoint.write_checkpoint

    def write_checkpoint(path, content, *checks):
        if content["step"] >= fault.at:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(b"PK" + bytes(50_000))
            _die()
        real_write(path, content, *checks)

    checkpoint.write_checkpoint = write_checkpoint


def _kill_before_link(fault: Fault, rank: int) -> None:
    """The main process is killed between the checkpoint file and its links."""
    real_mend = checkpoint.mend_links

    def mend_links(folder, newest, *rest):
        if step_of(newest) >= fault.at:
            _die()
        real_mend(folder, newest, *rest)

    checkpoint.mend_links = mend_links


def _disk_full(fault: Fault, rank: int) -> None:
    """No checkpoint can be written any more. After the first failed save, the main process leaves
    the file "full" and waits to be killed.
    """
    real_write = checkpoint.write_checkpoint
    real_wait = checkpoint.Saver.wait

    def write_checkpoint(path, content, *checks):
        if content["step"] >= fault.at:
            raise OSError(28, "No space left on device")
        real_write(path, content, *checks)

    def wait(saver):
        real_wait(saver)
        if saver.failure:
            (fault.folder / "full").touch()
            time.sleep(300)

    checkpoint.write_checkpoint = write_checkpoint
    if rank == 0:
        checkpoint.Saver.wait = wait


def _disk_full_and_freed(fault: Fault, rank: int) -> None:
    """One save fails, the next one succeeds; then the main process is killed."""
    real_write = checkpoint.write_checkpoint
    failed_steps: list[int] = []

    def write_checkpoint(path, content, *checks):
        step = content["step"]
        if step >= fault.at:
            # A later save has to follow, or the run would end without the fault.
            if not failed_steps and step < TOTAL_STEPS - 6:
                failed_steps.append(step)
            if step in failed_steps:
                raise OSError(28, "No space left on device")
        real_write(path, content, *checks)
        if step >= fault.at:
            _die()

    checkpoint.write_checkpoint = write_checkpoint


_INSTALL: dict[str, Callable[[Fault, int], None]] = {
    "raise alone": _raise_alone,
    "kill at epoch": _kill_at_epoch,
    "kill in evaluation": _kill_in_evaluation,
    "kill in checkpoint": _kill_in_checkpoint,
    "kill before link": _kill_before_link,
    "disk full": _disk_full,
    "disk full and freed": _disk_full_and_freed,
}


def latest_step(kind: str) -> int:
    """The last step at which a fault of this kind can strike and still end the attempt."""
    if kind == "disk full":
        # Two saves have to follow: one fails, the next one reports it.
        return TOTAL_STEPS - 6
    return TOTAL_STEPS - 2


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint file."""
    return int(path.stem.removeprefix("step_"))


def damage_files(kind: str, folder: Path, generator: random.Random, damaged: set[str]) -> str:
    """Damage the files of a run between two attempts.

    Args:
        kind: one of `FILE_FAULTS`.
        folder: the run's folder.
        generator: chooses the bit to flip or the place to cut.
        damaged: identifies the files that earlier calls damaged; this call adds its own.

    Returns:
        What was done, for the log.
    """
    if kind == "leftovers":
        _leave_half_written_files(folder)
        return f"{kind}: half of a checkpoint and half of a line"
    newest = good_checkpoints(folder, damaged)[-1]
    content = bytearray(newest.read_bytes())
    if kind == "flip a lone one":
        newest.with_name(newest.name + ".sha256").unlink(missing_ok=True)
    if kind.startswith("flip"):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif kind == "truncate newest":
        del content[generator.randrange(1, len(content)) :]
    else:
        content.clear()
    newest.write_bytes(content)
    damaged.add(_identity(newest))
    return f"{kind}: {newest.name}"


def good_checkpoints(folder: Path, damaged: set[str]) -> list[Path]:
    """The checkpoint files of a run that `damage_files` has not damaged, the newest last."""
    files = sorted((folder / "checkpoints").glob("step_*.pt"))
    return [path for path in files if _identity(path) not in damaged]


def _identity(path: Path) -> str:
    """Changes when the file is written again."""
    return str(path.stat())


def _leave_half_written_files(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "step_00000099.pt.tmp").write_bytes(b"PK half")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')
