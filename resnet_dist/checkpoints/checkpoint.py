"""The state of a run, and the thread that saves it.

A checkpoint is one file of plain types, `step_<step>.pt` (see checkpoint_file.py). It is written
under a temporary name, synced and renamed, so that a file under its final name is complete. Nothing
in it belongs to a rank: the position in the epoch, the order of the images and their crops follow
from `step`.
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

from resnet_dist.checkpoints.checkpoint_file import FORMAT, Content, digest_path, write_checkpoint
from resnet_dist.checkpoints.run_folder import (
    Claim,
    find_step,
    mark_as_saved,
    mend_digest,
    mend_links,
    newest_first,
    step_path,
)
from resnet_dist.ema import Ema
from resnet_dist.models.weights import load_exactly
from resnet_dist.text import printable

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class TrainState:
    """All that an update changes.

    Attributes:
        model: The network itself, not its DDP wrapper.
        optimizer: The optimizer of its weights.
        scaler: The scaler of the loss for float16; disabled for other precisions.
        ema: The average of the weights, if there is one.
        step: Number of updates.
        evaluated_step: The step of the last evaluation; -1 for none.
        best_top1: The best top-1 accuracy in percent; -1 for none.
        best_step: The step of the best evaluation; -1 for none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
    step: int = 0
    evaluated_step: int = -1
    best_top1: float = -1.0
    best_step: int = -1

    def state_dict(self) -> Content:
        """Return the state as plain types and tensors. The tensors are not copied."""
        average = self.ema.model.state_dict() if self.ema else None
        return {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best_top1": self.best_top1,
            "best_step": self.best_step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": average,
        }

    def load_state_dict(self, saved: Content) -> None:
        """Load the content of a checkpoint, except for the settings of the optimizer.

        Learning rate, weight decay and so on are those of the present config. The average of the
        weights starts from the weights if the checkpoint has none.

        Args:
            saved: The content, in the form of `state_dict`.

        Raises:
            ValueError: The checkpoint does not fit the network or the optimizer.
        """
        name = f"the checkpoint of step {saved['step']}"
        load_exactly(self.model, saved["model"], name)
        self._load_optimizer(saved["optimizer"], name)
        if self.scaler.is_enabled() and saved["scaler"]:
            self._load_scaler(saved["scaler"], name)
        if self.ema:
            average = saved["ema"] or saved["model"]
            load_exactly(self.ema.model, average, name)
        self.step = saved["step"]
        self.evaluated_step = saved["evaluated_step"]
        self.best_top1 = saved["best_top1"]
        self.best_step = saved["best_step"]

    def _load_scaler(self, saved: Content, name: str) -> None:
        try:
            self.scaler.load_state_dict(saved)
        except (KeyError, RuntimeError, TypeError, ValueError) as problem:
            raise ValueError(
                f"{name} has a damaged state of the GradScaler: {problem!r}"
            ) from problem

    def _load_optimizer(self, saved: Content, name: str) -> None:
        """Load the buffers of the optimizer, such as the momentum, and keep its settings."""
        own = self.optimizer.state_dict()
        parameters: list[torch.Tensor] = []
        for group in self.optimizer.param_groups:
            parameters.extend(group["params"])
        for index, buffers in saved["state"].items():
            own_buffers = own["state"].get(index, {})
            if not _fits_parameter(buffers, index, parameters, own_buffers):
                raise ValueError(
                    f"{name} has optimizer state that does not fit parameter {index!r} of this "
                    "network: take another output_dir, or checkpoint.init_from for its weights"
                )
        merged = {
            "state": {**own["state"], **saved["state"]},
            "param_groups": own["param_groups"],
        }
        self.optimizer.load_state_dict(merged)


def _fits_parameter(
    buffers: Content, index: object, parameters: list[torch.Tensor], own: Content
) -> bool:
    """Whether the optimizer can use saved buffers.

    Args:
        buffers: The saved buffers of one parameter by name, such as its momentum.
        index: The number of the parameter.
        parameters: All parameters of the optimizer.
        own: The present buffers of this parameter.
    """
    if not isinstance(index, int):
        return False
    if not 0 <= index < len(parameters):
        return False
    if not own.keys() <= buffers.keys():
        return False
    shape = parameters[index].shape
    tensors = [value for value in buffers.values() if isinstance(value, torch.Tensor)]
    return all(value.ndim == 0 or value.shape == shape for value in tensors)


class Saver:
    """Write checkpoints in a background thread. Only the main process writes.

    A save that fails (a full disk, a missing folder) is a warning: the older files stay valid and
    training continues.

    Args:
        folder: The folder `checkpoints` of the run.
        keep: Number of the newest checkpoints to keep, beside the best one.
        facts: Further content of every checkpoint, such as the config.
        warn: Prints a warning.
        is_main: Whether this is the main process.

    Attributes:
        failure: Why the last save failed.
        saved: Step of the newest valid checkpoint, and step of the evaluation that it knows of.
        best_step: Step of the checkpoint to which best.pt points.
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
        self.saved = (-1, -1)
        self.best_step = -1
        self._claim = Claim(folder, warn)

    def claim(self) -> None:
        """Make this process the one that may save here.

        It also repairs the links and the digest that a killed process has left behind.

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
        """Raise ValueError if another process has claimed the folder since `claim`."""
        self._claim.check()

    def note_saved(self, state: TrainState) -> None:
        """Record that the folder holds a checkpoint of `state`, which was read from it."""
        self.saved = (state.step, state.evaluated_step)
        self.best_step = state.best_step

    def save(self, state: TrainState) -> None:
        """Copy the state to CPU memory, and write it in the background.

        The copy takes tens of milliseconds for ResNet-50. A state that is already saved is not
        written again.

        Args:
            state: The state.

        Raises:
            ValueError: Another process has claimed the folder.
        """
        if not self.is_main:
            return
        self.wait()
        if self.saved == (state.step, state.evaluated_step):
            return
        self.check_claim()
        content = copy_to_cpu(state.state_dict())
        snapshot = {"format": FORMAT, **self.facts, **content}
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the background thread, and warn if its write has failed."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if self.failure:
            self.warn(self.failure)

    def _write(self, snapshot: Content) -> None:
        """Write a checkpoint, in the background thread."""
        step = snapshot["step"]
        path = step_path(self.folder, step)
        try:
            _refuse_nonfinite(snapshot["model"])
            self._write_file(path, snapshot)
        # No error of a save may end the training.
        except Exception as problem:
            last_step, _ = self.saved
            before = "none is saved yet"
            if last_step >= 0:
                before = f"the one of step {last_step} stays"
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
        """Write the file. A missing folder is created once, and a full disk is freed.

        Raises:
            OSError: The file cannot be written.
        """
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
        """Remove the oldest checkpoint that is not needed, to free the disk.

        The last valid checkpoint, the best one, and `new` stay.

        Returns:
            Whether a file was removed.
        """
        self._sweep()
        needed = {new, find_step(self.folder, self.best_step)}
        files = newest_first(self.folder)
        last_step, _ = self.saved
        last_good = find_step(self.folder, last_step)
        if last_good is not None:
            needed.add(last_good)
        else:
            needed.update(files[:1])
        for path in reversed(files):
            if path in needed:
                continue
            if _remove(path):
                return True
        return False

    def _tidy(self, path: Path) -> None:
        """Set the links after a save, and remove old checkpoints."""
        if not path.exists():
            # The folder was moved meanwhile: the one in its place may belong to a newer process.
            return
        best = find_step(self.folder, self.best_step)
        mend_links(self.folder, path, self.best_step)
        files = newest_first(self.folder)
        for old in files[self.keep :]:
            if old not in (path, best):
                _remove(old)
        self._sweep()
        mark_as_saved(self.folder)

    def _sweep(self) -> None:
        """Remove the temporary files of processes that were killed while they wrote."""
        for leftover in self.folder.glob("*.pt*.tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _remove(path: Path) -> bool:
    """Remove a checkpoint and its digest; return whether this was possible."""
    try:
        path.unlink(missing_ok=True)
        digest_path(path).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _refuse_nonfinite(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a weight is NaN or infinite."""
    for value in weights.values():
        if not value.is_floating_point():
            continue
        is_finite = torch.isfinite(value).all()
        if not is_finite:
            raise ValueError(
                "the weights hold values that are not finite; such a state is never saved"
            )


def copy_to_cpu(tree: Any) -> Any:  # noqa: ANN401  a tree of any plain types
    """Copy nested dicts and lists, with their tensors in CPU memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [copy_to_cpu(value) for value in tree]
    return tree
