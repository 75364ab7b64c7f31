"""The state of a run, and the thread that saves it.

A checkpoint is one file of plain types, `step_<step>.pt` (see checkpoint_file.py). It is written to
a temporary name, synced and renamed, so that a file under its own name is whole. Nothing in it
belongs to a rank: position, order and crops follow from `step`.
"""

import contextlib
import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_dist.checkpoint_file import FORMAT, Content, digest_path, write_checkpoint
from resnet_dist.ema import Ema
from resnet_dist.models.weights import load_exactly
from resnet_dist.run_folder import (
    Claim,
    find_step,
    mark_as_saved,
    mend_digest,
    mend_links,
    newest_first,
    step_path,
)
from resnet_dist.text import printable

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class TrainState:
    """All that an update changes. `model` is the plain module, not its DDP wrapper."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
    step: int = 0
    evaluated_step: int = -1
    best_top1: float = -1.0
    best_step: int = -1

    def state_dict(self) -> Content:
        """Plain types and tensors; the tensors are the live ones."""
        return {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best_top1": self.best_top1,
            "best_step": self.best_step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
        }

    def load_state_dict(self, saved: Content) -> None:
        """Take over the content of a checkpoint, except for the optimizer's settings.

        Learning rate, weight decay and so on are those of the present config. The average starts
        from the weights if the checkpoint has none.

        Raises:
            ValueError: The checkpoint does not fit the network or the optimizer.
        """
        name = f"the checkpoint of step {saved['step']}"
        load_exactly(self.model, saved["model"], name)
        self._load_optimizer(saved["optimizer"], name)
        if self.scaler.is_enabled() and saved["scaler"]:
            try:
                self.scaler.load_state_dict(saved["scaler"])
            except (KeyError, RuntimeError, TypeError, ValueError) as problem:
                raise ValueError(
                    f"{name} has a damaged state of the GradScaler: {problem!r}"
                ) from problem
        if self.ema:
            load_exactly(self.ema.model, saved["ema"] or saved["model"], name)
        self.step = saved["step"]
        self.evaluated_step = saved["evaluated_step"]
        self.best_top1 = saved["best_top1"]
        self.best_step = saved["best_step"]

    def _load_optimizer(self, saved: Content, name: str) -> None:
        own = self.optimizer.state_dict()
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        for index, buffers in saved["state"].items():
            if not _fits_parameter(buffers, index, parameters, own["state"].get(index, {})):
                raise ValueError(
                    f"{name} has optimizer state that does not fit parameter {index!r} of this "
                    "network: take another output_dir, or checkpoint.init_from for its weights"
                )
        self.optimizer.load_state_dict(
            {"state": {**own["state"], **saved["state"]}, "param_groups": own["param_groups"]}
        )


def _fits_parameter(
    buffers: Content, index: object, parameters: list[torch.Tensor], own: Content
) -> bool:
    """Whether the optimizer can use `buffers` (momentum, say) for the parameter `index`."""
    if not isinstance(index, int) or not 0 <= index < len(parameters):
        return False
    if not own.keys() <= buffers.keys():
        return False
    tensors = [value for value in buffers.values() if isinstance(value, torch.Tensor)]
    return all(value.ndim == 0 or value.shape == parameters[index].shape for value in tensors)


class Saver:
    """Writes checkpoints in the background, beside training. Does nothing off the main process.

    A save that fails (full disk, folder gone) is a warning: the files before it stay good and
    training goes on.
    """

    def __init__(
        self, folder: Path, keep: int, facts: Content, warn: Callable[[str], None], is_main: bool
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.facts = facts
        self.warn = warn
        self.is_main = is_main
        self.thread: threading.Thread | None = None
        self.failure: str | None = None
        """why the last save failed"""
        self.saved = (-1, -1)
        """step of the newest good checkpoint, and step of the evaluation that it knows of"""
        self.best_step = -1
        """step of the checkpoint that best.pt leads to"""
        self._claim = Claim(folder, warn)

    def claim(self) -> None:
        """Make this process the one that may save here, and mend what a killed one left behind.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The file `attempt` is damaged, and the run that wrote it is alive.
        """
        self._claim.take()
        newest = find_step(self.folder, self.saved[0])
        if newest is not None:
            mend_digest(newest)
            mend_links(self.folder, newest, self.best_step)

    def check_claim(self) -> None:
        """Raise ValueError if another process has claimed the folder since."""
        self._claim.check()

    def note_saved(self, state: TrainState) -> None:
        """Take note that the folder holds a checkpoint of `state`, which was read from there."""
        self.saved = (state.step, state.evaluated_step)
        self.best_step = state.best_step

    def save(self, state: TrainState) -> None:
        """Copy the state now (tens of milliseconds for ResNet-50), and write it in the background.

        What is already saved is not written again. Raises ValueError as `check_claim`.
        """
        if not self.is_main:
            return
        self.wait()
        if self.saved == (state.step, state.evaluated_step):
            return
        self.check_claim()
        snapshot = {"format": FORMAT, **self.facts, **copy_to_cpu(state.state_dict())}
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the write under way; if it failed, warn on the caller's thread."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if self.failure:
            self.warn(self.failure)

    def _write(self, snapshot: Content) -> None:
        step = snapshot["step"]
        path = step_path(self.folder, step)
        try:
            _refuse_nonfinite(snapshot["model"])
            self._write_file(path, snapshot)
        except Exception as problem:  # whatever it was, training must not end for it
            before = (
                f"the one of step {self.saved[0]} stays"
                if self.saved[0] >= 0
                else "none is saved yet"
            )
            self.failure = (
                f"could not save the checkpoint of step {step} to {printable(path)}: "
                f"{printable(problem)}; {before}"
            )
            return
        self.failure = None
        self.saved = (step, snapshot["evaluated_step"])
        self.best_step = snapshot["best_step"]
        self._tidy(path)

    def _write_file(self, path: Path, snapshot: Content) -> None:
        """Write the file, also if the folder has vanished or the disk is full."""
        made_again = False
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_checkpoint(path, snapshot, self.check_claim)
                return
            except FileNotFoundError:
                if made_again:
                    raise
                made_again = True
            except OSError as problem:
                if problem.errno not in _DISK_IS_FULL or not self._remove_oldest(path):
                    raise

    def _remove_oldest(self, new: Path) -> bool:
        """Remove one checkpoint; False if only the last good and the best one are left."""
        self._sweep()
        needed = {new, find_step(self.folder, self.best_step)}
        files = newest_first(self.folder)
        last_good = find_step(self.folder, self.saved[0])
        if last_good is not None:
            needed.add(last_good)
        else:
            needed.update(files[:1])
        return any(path not in needed and _remove(path) for path in reversed(files))

    def _tidy(self, path: Path) -> None:
        """After a save: set the links, and keep the newest files and the best."""
        if not path.exists():
            # The folder was moved away meanwhile: the one in its place may be of a newer attempt.
            return
        best = find_step(self.folder, self.best_step)
        mend_links(self.folder, path, self.best_step)
        for old in newest_first(self.folder)[self.keep :]:
            if old not in (path, best):
                _remove(old)
        self._sweep()
        mark_as_saved(self.folder)

    def _sweep(self) -> None:
        """Remove what processes left behind that were killed while they wrote."""
        for leftover in self.folder.glob("*.pt*.tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _remove(path: Path) -> bool:
    """Remove a checkpoint and its digest; False if that is not possible."""
    try:
        path.unlink(missing_ok=True)
        digest_path(path).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _refuse_nonfinite(weights: dict[str, torch.Tensor]) -> None:
    for value in weights.values():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                "the weights hold values that are not finite; such a state is never saved"
            )


def copy_to_cpu(tree: Any) -> Any:  # noqa: ANN401  a tree of any plain types
    """A copy of nested dicts and lists whose tensors lie in CPU memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [copy_to_cpu(value) for value in tree]
    return tree
