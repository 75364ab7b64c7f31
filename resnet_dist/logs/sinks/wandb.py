"""The metrics of a run for Weights & Biases.

It never asks the user a question. The run is online if there is an API key and the server answers,
and otherwise in wandb's own offline mode. A resumed run continues the same W&B run, whose id is in
the file `wandb_run_id`.
"""

import io
import os
import secrets
import shlex
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

# wandb records no code, packages, git state, facts of the machine or captured output. It has no
# public setting for the packages and the machine.
_RECORD_NUMBERS_ONLY = {
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}

# A larger matrix is too large to be drawn; the table of predictions is still there.
_MOST_CLASSES_OF_A_MATRIX = 100

URL_FILE = "wandb_url"
"""Name of the file in output_dir with the address of an online run, for `report`."""


class WandbSink:
    """A W&B run."""

    name = "W&B"
    location = "none"

    _info: RunInfo
    _run: "Run"

    def __init__(self) -> None:
        self._already_sent: dict[str, int] = {}

    def start(self, run: RunInfo) -> None:
        """Start or continue the W&B run, online or offline; at most about half a minute."""
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

        self._info = run
        run_id = ""
        id_file = run.folder / "wandb_run_id"
        if id_file.is_file():
            self._already_sent = run.last_steps
            run_id = id_file.read_text().strip()
        if not run_id:
            run_id = secrets.token_hex(4)
            write_file(id_file, run_id + "\n")

        mode = wandb_mode(run.config.wandb)
        reason = why_offline(mode)
        if not reason:
            try:
                self._run = _init_wandb(run, "online", run_id, _INIT_SECONDS[mode])
            except Exception as error:
                reason = f"going online failed: {describe_error(error)}"
                # The failed attempt still holds the id of the run.
                wandb.teardown(exit_code=1)
        if reason:
            self._run = _init_wandb(run, "offline", run_id)
            folder = self._folder()
            upload = printable(f"wandb sync {folder}/offline-run-*-{run_id}")
            self.location = f"{folder} (upload: {upload})"
            run.say(f"W&B is offline ({reason}); to upload later: {upload}")
        else:
            self.location = str(self._run.url)
            write_file(run.folder / URL_FILE, self.location + "\n")
            run.say(f"W&B: {self.location}")

    def _folder(self) -> str:
        """The folder of wandb's files, as a word of a command line."""
        return printable(shlex.quote(str(self._info.folder / "wandb")))

    def log(self, step: int, values: Numbers) -> None:
        """Send the values, except those that an earlier process of the run has sent already.

        A resumed run repeats some steps. W&B would show them twice.
        """
        new = {}
        for key, value in values.items():
            last_step = self._already_sent.get(key, -1)
            if step > last_step:
                new[key] = value
        if new:
            self._run.log({"step": step, **new})

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Send a picture, a table, a confusion matrix or a checkpoint."""
        import wandb

        shown: Any
        match item:
            case CheckpointFile():
                artifact = wandb.Artifact(item.name, type="model", metadata=item.facts)
                artifact.add_file(str(item.path))
                self._run.log_artifact(artifact)
                return
            case Picture():
                picture = Image.open(io.BytesIO(item.png))
                shown = wandb.Image(picture, caption=item.caption)
            case Table():
                shown = wandb.Table(columns=list(item.columns), data=item.rows)
            case ConfusionMatrix():
                if len(item.class_names) > _MOST_CLASSES_OF_A_MATRIX:
                    return
                shown = wandb.plot.confusion_matrix(
                    y_true=item.labels,
                    preds=item.predicted,
                    class_names=item.class_names,
                    title="Confusion matrix",
                )
        self._run.log({"step": step, key: shown})

    def close(self, exit_code: int) -> None:
        """Send the remaining values, within `finish_timeout`."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._info.warn(
                f"W&B did not finish within {_FINISH_SECONDS:.0f} s; to upload later: "
                f"wandb sync --include-online {self._folder()}/*run-*"
            )


def _init_wandb(run: RunInfo, mode: str, run_id: str, timeout: float = 30.0) -> "Run":
    """Start or continue a run, with wandb's own limits of time."""
    import wandb

    wanted: dict[str, Any] = {
        **_RECORD_NUMBERS_ONLY,
        "mode": mode,
        "init_timeout": timeout,
        "finish_timeout": _FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 2.0,
    }
    # An older wandb does not know all of them.
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
