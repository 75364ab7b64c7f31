"""Where a run starts: a checkpoint, weights of another file, or new weights."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resnet_dist.checkpoints.checkpoint import Saver, TrainState
from resnet_dist.checkpoints.checkpoint_file import (
    NEEDED_TO_RESUME,
    read_checkpoint,
    refuse_newer,
    unpack_checkpoint,
    unpack_weights,
)
from resnet_dist.checkpoints.resume_rules import check_resumable, model_changes
from resnet_dist.checkpoints.run_folder import (
    checkpoint_names,
    find_checkpoint,
    newest_valid,
    refuse_lost,
)
from resnet_dist.checkpoints.torchvision_weights import download_weights
from resnet_dist.config import CheckpointConfig, Config
from resnet_dist.distributed.process import StartAgainError
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.files import write_file
from resnet_dist.logs.log import Log
from resnet_dist.models import weights
from resnet_dist.models.build import TWO_PADDED_SHORTCUTS, pads_shortcuts
from resnet_dist.text import printable


@dataclass(frozen=True)
class StartPoint:
    """Where the first weights and the first step come from."""

    checkpoint_path: str = ""
    """checkpoint to resume; empty = none"""
    saved: dict[str, Any] | None = None
    """content of that checkpoint"""
    is_own: bool = False
    """whether that checkpoint is in output_dir, and not of another run"""
    weights_path: str = ""
    """file or torchvision name of the weights to start from at step 0; empty = none"""
    names_seen: frozenset[str] = frozenset()
    """names of the checkpoints that were in output_dir when this was chosen"""

    @property
    def saved_config(self) -> dict[str, Any] | None:
        """The config of the run that wrote the checkpoint, as nested plain types."""
        if self.saved is None:
            return None
        config: dict[str, Any] = self.saved["config"]
        return config


def checkpoint_folder(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.output_dir) / "checkpoints"


def find_start(
    config: Config,
    runtime: Runtime,
    log: Log,
) -> StartPoint:
    """Find what the run starts from, and read the checkpoint if it is one. Call it on every rank.

    The first of these that exists is taken: the newest valid checkpoint in output_dir,
    `checkpoint.resume`, `checkpoint.init_from` (only weights), new weights. Only the main process
    reads the file. It sends the bytes to the other ranks.

    Args:
        config: The settings of the run.
        runtime: The process group.
        log: Where warnings go.

    Raises:
        ValueError: On every rank, if the file cannot be read, or if checkpoints of output_dir have
            disappeared.
    """
    section = config.checkpoint
    folder = checkpoint_folder(config)
    # Listed first: what is saved from here on is noticed by `refuse_outdated_start`.
    names = runtime.on_main(lambda: checkpoint_names(folder))
    return replace(_choose_start(section, folder, runtime, log), names_seen=names)


def _choose_start(
    section: CheckpointConfig, folder: Path, runtime: Runtime, log: Log
) -> StartPoint:
    """Choose the first that exists, see `find_start`."""
    newest = runtime.on_main(lambda: newest_valid(folder, log.warn))
    if newest:
        path = str(newest)
        _report_ignored_settings(section, path, log)
        return StartPoint(
            checkpoint_path=path,
            saved=_read(path, runtime),
            is_own=True,
        )
    runtime.on_main(lambda: refuse_lost(folder))
    if section.resume:
        path = _find(section.resume, runtime, log, best=False)
        return StartPoint(
            checkpoint_path=path,
            saved=_read(path, runtime, log),
        )
    is_file = section.init_from and not section.init_from.startswith("torchvision:")
    if is_file:
        path = _find(section.init_from, runtime, log, best=True)
        return StartPoint(weights_path=path)
    return StartPoint(weights_path=section.init_from)


def refuse_outdated_start(start: StartPoint, config: Config, runtime: Runtime) -> None:
    """Raise StartAgainError if another process has saved a checkpoint since `start` was chosen.

    That process, an earlier attempt of the same run, saves no more once this one has claimed the
    folder. Call it after that, on every rank: the next start finds the new checkpoint.
    """
    folder = checkpoint_folder(config)
    names = runtime.on_main(lambda: checkpoint_names(folder))
    new = sorted(names - start.names_seen)
    if new:
        raise StartAgainError(
            f"an earlier attempt of this run saved {printable(new[-1])} while this one started; "
            "the same command resumes from there"
        )


def _find(
    path: str,
    runtime: Runtime,
    log: Log,
    best: bool,
) -> str:
    """Find the checkpoint that a setting names.

    Args:
        path: A checkpoint, or the folder of a run.
        runtime: The process group.
        log: Where warnings go.
        best: Whether to take the best checkpoint of a folder, and not the newest.
    """
    found: str = runtime.on_main(lambda: str(find_checkpoint(Path(path), log.warn, best)))
    return found


def _report_ignored_settings(
    section: CheckpointConfig,
    path: str,
    log: Log,
) -> None:
    """Say which settings have no effect because the run resumes from its own checkpoint."""
    for key in ("resume", "init_from"):
        if getattr(section, key):
            log.say(f"resuming from {printable(path)}; checkpoint.{key} is ignored")


def _read(
    path: str,
    runtime: Runtime,
    log: Log | None = None,
) -> dict[str, Any]:
    """Read a checkpoint on the main process, and decode it on every rank.

    Args:
        path: The file.
        runtime: The process group.
        log: Where the warning about a file without a digest goes; None = no warning.
    """
    say = None
    if log is not None:
        say = log.warn
    payload = runtime.bytes_from_main(lambda: read_checkpoint(Path(path), say))
    return unpack_checkpoint(payload, path, NEEDED_TO_RESUME)


def restore(
    state: TrainState,
    start: StartPoint,
    config: Config,
    saver: Saver,
    runtime: Runtime,
    log: Log,
) -> str:
    """Load the training state, or only the weights, from the start point.

    Args:
        state: The state of the run, which is changed in place.
        start: What `find_start` returned.
        config: The settings of the run.
        saver: Knows the facts of the run, which must match those of the checkpoint.
        runtime: The process group.
        log: Where warnings go.

    Returns:
        Where the state comes from, in a few words.

    Raises:
        ValueError: On every rank, if the checkpoint or the weights do not fit the run.
    """
    if start.saved is not None:
        _resume(state, start, saver, log)
        return f"from {start.checkpoint_path}"
    if start.weights_path:
        _init_weights(
            state,
            start.weights_path,
            config,
            saver,
            runtime,
            log,
        )
        return f"with the weights of {start.weights_path}"
    return "from scratch"


def _resume(
    state: TrainState,
    start: StartPoint,
    saver: Saver,
    log: Log,
) -> None:
    """Load everything: weights, optimizer, gradient scaler, averaged weights and step."""
    assert start.saved is not None
    for change in check_resumable(start.saved, saver.facts):
        log.warn(f"the run continues with a changed setting: {change}")
    state.load_state_dict(start.saved)
    if start.is_own:
        saver.note_saved(state)
    else:
        # The best checkpoint so far is in the folder of the other run.
        state.best_top1 = -1.0
        state.best_step = -1


def _init_weights(
    state: TrainState,
    path: str,
    config: Config,
    saver: Saver,
    runtime: Runtime,
    log: Log,
) -> None:
    """Load only the weights, from a file or from torchvision, and report what was loaded.

    The log gets a short table, and init_from.txt in output_dir the full one.
    """

    def read() -> bytes:
        if path.startswith("torchvision:"):
            return download_weights(path)
        return read_checkpoint(Path(path), log.warn)

    payload = runtime.bytes_from_main(read)
    content = unpack_weights(payload, path)
    refuse_newer(content, path)
    rows, is_complete = weights.load_weights(state.model, content, path)
    if state.ema:
        state.ema.model.load_state_dict(state.model.state_dict())

    keys, _ = weights.find_weights(content)
    location = ".".join(keys) or "top level of the file"
    title = f"weights of {printable(path)}, {printable(location)}"
    if is_complete:
        log.say(title)
    else:
        log.warn(f"{title}: not all of them fit")
    log.say(weights.describe(rows))
    _warn_about_other_network(
        content,
        path,
        config,
        saver,
        log,
    )

    def write_table() -> None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        table = weights.describe(rows, most=sys.maxsize)
        write_file(folder / "init_from.txt", f"{title}\n{table}\n")

    runtime.on_main(write_table)


def _warn_about_other_network(
    content: dict[str, Any],
    path: str,
    config: Config,
    saver: Saver,
    log: Log,
) -> None:
    """Warn if the tensors fit, but belong to a different network or to other classes.

    Args:
        content: The content of the file.
        path: The file, for the messages.
        config: The settings of the run.
        saver: Knows the class names of the run.
        log: Where the warnings go.
    """
    if "config" not in content and pads_shortcuts(config.model):
        log.warn(f"{path}: {TWO_PADDED_SHORTCUTS}")
    changes = model_changes(content, config)
    if changes:
        reasons = "; ".join(changes)
        log.warn(f"{path} is of a different network, whose tensors may fit all the same: {reasons}")
    names = content.get("class_names")
    own_names = saver.facts["class_names"]
    if not isinstance(names, list) or names == own_names:
        return
    if len(names) == len(own_names):
        log.warn(
            f"{path} has the same number of classes, but with other names; its classifier is "
            "loaded all the same"
        )
