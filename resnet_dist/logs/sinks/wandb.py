"""The metrics of a run for Weights & Biases.

It never asks the user a question. The run is online if there is an API key and the server answers,
and otherwise in wandb's own offline mode. A resumed run continues the same W&B run, whose id is in
the file `wandb_run_id`.
"""

import io
import os
import secrets
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from resnet_dist.files import write_file
from resnet_dist.logs.sinks.background import describe_error
from resnet_dist.logs.sinks.base import (
    Attachment,
    CheckpointFile,
    ConfusionMatrix,
    Numbers,
    Picture,
    RunInfo,
    Table,
)
from resnet_dist.logs.sinks.wandb_mode import wandb_mode, why_offline
from resnet_dist.text import printable

if TYPE_CHECKING:
    from wandb import Run

# wandb's own limits for the start of an online run, and for sending what is left at the end. With
# `log.wandb` auto, a server that does not answer soon is taken as out of reach.
_INIT_SECONDS = {"auto": 10.0, "online": 30.0}
_FINISH_SECONDS = 30.0

# A larger matrix is too large to be drawn; the table of predictions is still there.
_MOST_CLASSES_OF_A_MATRIX = 100


URL_FILE = "wandb_url"
"""Name of the file in output_dir with the address of an online run, for `report`."""


class WandbSink:
    """A W&B run."""

    name = "W&B"
    location = "none"

    def __init__(self) -> None:
        self._run: Run | None = None
        self._info: RunInfo | None = None
        self._already_sent: dict[str, int] = {}

    def start(self, run: RunInfo) -> None:
        """Start or continue the W&B run, online or offline; at most about half a minute."""
        self._info = run
        if (run.folder / "wandb_run_id").is_file():
            self._already_sent = run.last_steps
        run_id = _read_or_make_run_id(run.folder)
        # Without these, wandb announces the credentials it found and reports its own crashes.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Copies of tables and checkpoints that are not sent yet; otherwise in the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb"))
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "wandb is not installed: pip install wandb, or --log.wandb disabled"
            ) from None

        mode = wandb_mode(run.config.wandb)
        reason = why_offline(mode)
        if not reason:
            try:
                self._run = _init_wandb(run, "online", run_id, _INIT_SECONDS[mode])
                self.location = str(self._run.url)
                write_file(run.folder / URL_FILE, self.location + "\n")
                run.say(f"W&B: {self.location}")
                return
            except Exception as error:
                reason = f"going online failed: {describe_error(error)}"
                # The failed attempt still holds the id of the run.
                wandb.teardown(exit_code=1)
        self._run = _init_wandb(run, "offline", run_id, _INIT_SECONDS["online"])
        folder = shlex.quote(str(run.folder / "wandb"))
        upload = f"wandb sync {folder}/offline-run-*-{run_id}"
        self.location = f"{printable(folder)} (upload: {printable(upload)})"
        run.say(f"W&B is offline ({reason}); to upload later: {printable(upload)}")

    def log(self, step: int, values: Numbers) -> None:
        """Send the values, except those that an earlier process of the run has sent already.

        A resumed run repeats some steps. W&B would show them twice.
        """
        new = {}
        for key, value in values.items():
            last_step = self._already_sent.get(key, -1)
            if step > last_step:
                new[key] = value
        assert self._run is not None
        if new:
            self._run.log({"step": step, **new})

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Send a picture, a table, a confusion matrix or a checkpoint."""
        import wandb

        assert self._run is not None
        if isinstance(item, CheckpointFile):
            artifact = wandb.Artifact(item.name, type="model", metadata=item.facts)
            artifact.add_file(str(item.path))
            self._run.log_artifact(artifact)
            return
        shown: Any = None
        if isinstance(item, Picture):
            with Image.open(io.BytesIO(item.png)) as picture:
                shown = wandb.Image(picture.convert("RGB"), caption=item.caption)
        elif isinstance(item, Table):
            shown = wandb.Table(columns=list(item.columns), data=item.rows)
        elif len(item.class_names) <= _MOST_CLASSES_OF_A_MATRIX:
            shown = _draw_matrix(item)
        if shown is not None:
            self._run.log({"step": step, key: shown})

    def close(self, exit_code: int) -> None:
        """Send the remaining values, within `finish_timeout`."""
        assert self._info is not None
        assert self._run is not None
        started = time.monotonic()
        self._run.finish(exit_code=exit_code)
        seconds = time.monotonic() - started
        if seconds > _FINISH_SECONDS:
            folder = printable(shlex.quote(str(self._info.folder / "wandb")))
            self._info.warn(
                f"W&B did not finish within {_FINISH_SECONDS:.0f} s; to upload later: "
                f"wandb sync --include-online {folder}/*run-*"
            )


def _draw_matrix(matrix: ConfusionMatrix) -> Any:  # noqa: ANN401 - a class of wandb's own
    """W&B's chart of a confusion matrix."""
    import wandb

    return wandb.plot.confusion_matrix(
        y_true=matrix.labels,
        preds=matrix.predicted,
        class_names=matrix.class_names,
        title="Confusion matrix",
    )


def _init_wandb(run: RunInfo, mode: str, run_id: str, timeout: float) -> "Run":
    """`wandb.init` without prompts, banners, code, packages, git state or captured output."""
    import wandb

    wanted: dict[str, Any] = {
        "mode": mode,
        "silent": True,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "init_timeout": timeout,
        "finish_timeout": _FINISH_SECONDS,
        "x_transaction_log_flush_interval": 2.0,
    }
    known = wandb.Settings.model_fields
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
    folder = run.folder.absolute()
    started = wandb.init(
        project=run.config.wandb_project,
        entity=run.config.wandb_entity,
        name=run.config.wandb_name or folder.name,
        dir=str(folder),
        id=run_id,
        config=run.run_config,
        resume="allow",
        settings=settings,
    )
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def _read_or_make_run_id(folder: Path) -> str:
    path = folder / "wandb_run_id"
    known = path.read_text().strip() if path.is_file() else ""
    if known:
        return known
    made = secrets.token_hex(4)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, made + "\n")
    return made
