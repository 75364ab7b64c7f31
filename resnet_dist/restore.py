"""What a run starts from: a checkpoint, weights of another file, or nothing."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.checkpoint import Saver, TrainState
from resnet_dist.checkpoint_file import (
    NEEDED_TO_RESUME,
    download_weights,
    read_checkpoint,
    refuse_newer,
    unpack_checkpoint,
    unpack_weights,
)
from resnet_dist.config import CheckpointConfig, Config
from resnet_dist.distributed import Runtime
from resnet_dist.files import write_file
from resnet_dist.log import Log
from resnet_dist.models import weights
from resnet_dist.resume_rules import check_resumable, model_changes
from resnet_dist.run_folder import find_checkpoint, newest_valid, refuse_lost
from resnet_dist.text import printable


@dataclass(frozen=True)
class StartPoint:
    """Where the first weights and the first step come from."""

    checkpoint_path: str = ""
    """checkpoint to resume; empty = none"""
    saved: dict[str, Any] | None = None
    """content of that checkpoint"""
    is_own: bool = False
    """whether that checkpoint is of this run (in its output_dir) and not of another one"""
    weights_path: str = ""
    """file, or name at torchvision, of the weights to start from at step 0; empty = none"""

    @property
    def saved_config(self) -> dict[str, Any] | None:
        """The config of the run that wrote the checkpoint, as nested plain types."""
        return None if self.saved is None else self.saved["config"]


def checkpoint_folder(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.output_dir) / "checkpoints"


def find_start(config: Config, runtime: Runtime, log: Log) -> StartPoint:
    """Find what the run starts from, and read the checkpoint if it is one; called by every rank.

    In this order: the newest valid checkpoint of output_dir, `checkpoint.resume`,
    `checkpoint.init_from` (weights only), nothing. Only the main process reads the file and sends
    its bytes to the others. Raises ValueError on every rank if the file cannot be read, or if
    output_dir held checkpoints that are gone.
    """
    section = config.checkpoint
    folder = checkpoint_folder(config)
    own = runtime.on_main(lambda: newest_valid(folder, log.warn))
    if own:
        _warn_about_ignored(section, str(own), log)
        return StartPoint(str(own), _read(str(own), runtime), is_own=True)
    runtime.on_main(lambda: refuse_lost(folder))
    if section.resume:
        path = _find(section.resume, runtime, log, best=False)
        return StartPoint(path, _read(path, runtime, log))
    if section.init_from and not section.init_from.startswith("torchvision:"):
        return StartPoint(weights_path=_find(section.init_from, runtime, log, best=True))
    return StartPoint(weights_path=section.init_from)


def _find(path: str, runtime: Runtime, log: Log, best: bool) -> str:
    """The file that a setting means, which may name the folder of a run."""
    found: str = runtime.on_main(lambda: str(find_checkpoint(Path(path), log.warn, best)))
    return found


def _warn_about_ignored(section: CheckpointConfig, own: str, log: Log) -> None:
    for key in ("resume", "init_from"):
        if getattr(section, key):
            log.say(f"resuming from {printable(own)}; checkpoint.{key} is ignored")


def _read(path: str, runtime: Runtime, log: Log | None = None) -> dict[str, Any]:
    say = None if log is None else log.warn
    payload = runtime.bytes_from_main(lambda: read_checkpoint(Path(path), say))
    return unpack_checkpoint(payload, path, NEEDED_TO_RESUME)


def restore(
    state: TrainState, start: StartPoint, config: Config, saver: Saver, runtime: Runtime, log: Log
) -> str:
    """Load the state of the start point; returns where it came from, in a few words.

    Raises ValueError on every rank when it does not fit this run.
    """
    if start.saved is not None:
        _resume(state, start, saver, log)
        return f"from {start.checkpoint_path}"
    if start.weights_path:
        _init_weights(state, start.weights_path, config, saver, runtime, log)
        return f"with the weights of {start.weights_path}"
    return "from scratch"


def _resume(state: TrainState, start: StartPoint, saver: Saver, log: Log) -> None:
    """Load everything: weights, optimizer, scaler, average, step."""
    assert start.saved is not None
    for change in check_resumable(start.saved, saver.facts):
        log.warn(f"the run continues with a changed setting: {change}")
    state.load_state_dict(start.saved)
    if start.is_own:
        saver.note_saved(state)
    else:
        # The file of that best checkpoint is in another folder.
        state.best_top1 = -1.0
        state.best_step = -1


def _init_weights(
    state: TrainState, path: str, config: Config, saver: Saver, runtime: Runtime, log: Log
) -> None:
    """Load weights only, from a file or from torchvision, and show what was loaded.

    The log gets a short table, init_from.txt in output_dir the whole one.
    """

    def read() -> bytes:
        if path.startswith("torchvision:"):
            return download_weights(path)
        return read_checkpoint(Path(path), log.warn)

    content = unpack_weights(runtime.bytes_from_main(read), path)
    refuse_newer(content, path)
    rows, complete = weights.load_weights(state.model, content, path)
    if state.ema:
        state.ema.model.load_state_dict(state.model.state_dict())

    found_under = ".".join(weights.find_weights(content)[0]) or "top level of the file"
    title = f"weights of {printable(path)}, {printable(found_under)}"
    if complete:
        log.say(title)
    else:
        log.warn(f"{title}: not all of them fit")
    log.say(weights.describe(rows))
    _warn_about_other_network(content, path, config, saver, log)

    def write_table() -> None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(
            folder / "init_from.txt", f"{title}\n{weights.describe(rows, most=sys.maxsize)}\n"
        )

    runtime.on_main(write_table)


def _warn_about_other_network(
    content: dict[str, Any], path: str, config: Config, saver: Saver, log: Log
) -> None:
    """Warn if the tensors fit, but mean something else."""
    changes = model_changes(content, config)
    if changes:
        log.warn(
            f"{path} is of a different network, whose tensors may fit all the same: "
            f"{'; '.join(changes)}"
        )
    names = content.get("class_names")
    own_names = saver.facts["class_names"]
    if isinstance(names, list) and names != own_names and len(names) == len(own_names):
        log.warn(
            f"{path} has the same number of classes, but with other names; its classifier is "
            "loaded all the same"
        )
