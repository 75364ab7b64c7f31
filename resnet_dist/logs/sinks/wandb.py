"""The metrics of a run for Weights & Biases.

It never asks the user a question. The run is online if there is an API key and the server answers,
and otherwise in wandb's own offline mode. A resumed run continues the same W&B run, whose id is in
the file `wandb_run_id`.
"""

import os
import secrets
import shlex
from typing import TYPE_CHECKING, Literal

from resnet_dist.files import write_file
from resnet_dist.logs.sinks.background import describe_error
from resnet_dist.logs.sinks.base import Attachment, Numbers, RunInfo, require_library
from resnet_dist.logs.sinks.wandb_attachments import send_attachment
from resnet_dist.logs.sinks.wandb_mode import silence_wandb, wandb_mode, why_offline
from resnet_dist.text import printable

if TYPE_CHECKING:
    from wandb import Run

# wandb's own limits for the start of an online run, and for sending what is left at the end. With
# `log.wandb` auto, a server that does not answer soon is taken as out of reach.
_INIT_SECONDS = {"auto": 10.0, "online": 30.0}
_FINISH_SECONDS = 30.0

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
        self._folder = ""

    def start(self, run: RunInfo) -> None:
        """Start or continue the W&B run, online or offline; at most about half a minute."""
        require_library("wandb", "pip install wandb, or --log.wandb disabled")
        folder = run.folder.absolute() / "wandb"
        # Copies of tables and checkpoints that are not sent yet; otherwise in the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder))
        silence_wandb()
        import wandb

        self._info = run
        # As a word of a command line.
        self._folder = printable(shlex.quote(str(run.folder / "wandb")))
        run_id = self._find_or_make_id()
        mode = wandb_mode(run.config.wandb)
        reason = why_offline(mode)
        if not reason:
            try:
                self._run = _init_wandb(run, "online", run_id, _INIT_SECONDS[mode])
            except Exception as error:
                if wandb.run is not None:
                    # The teardown would end that run of the user too.
                    raise
                reason = f"going online failed: {describe_error(error)}"
                # The failed attempt still holds the id of the run.
                wandb.teardown(exit_code=1)
        if reason:
            self._run = _init_wandb(run, "offline", run_id)
            upload = f"wandb sync {self._folder}"
            self.location = f"{self._folder} (upload: {upload})"
            run.say(f"W&B is offline ({reason}); to upload later: {upload}")
        else:
            self.location = str(self._run.url)
            write_file(run.folder / URL_FILE, self.location + "\n")
            run.say(f"W&B: {self.location}")

    def _find_or_make_id(self) -> str:
        """Return the id of the W&B run: that of an earlier process of the run, or a new one."""
        id_file = self._info.folder / "wandb_run_id"
        if id_file.is_file():
            run_id = id_file.read_text().strip()
            if run_id:
                self._already_sent = self._info.last_steps
                return run_id
        run_id = secrets.token_hex(4)
        write_file(id_file, run_id + "\n")
        return run_id

    def log(self, step: int, values: Numbers) -> None:
        """Send the values, except those that an earlier process of the run has sent already.

        A resumed run repeats some steps. W&B would show them twice.
        """
        new = {}
        for key, value in values.items():
            if step > self._already_sent.get(key, -1):
                new[key] = value
        if new:
            self._run.log({"step": step, **new})

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Send a picture, a table, a confusion matrix or a checkpoint."""
        send_attachment(self._run, step, key, item)

    def close(self, exit_code: int) -> None:
        """Send the remaining values, within `finish_timeout`."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._info.warn(
                f"W&B did not finish within {_FINISH_SECONDS:.0f} s; to upload later: "
                f"wandb sync --include-online {self._folder}"
            )


def _init_wandb(
    run: RunInfo, mode: Literal["online", "offline"], run_id: str, timeout: float = 30.0
) -> "Run":
    """Start or continue a run, with wandb's own limits of time."""
    import wandb

    settings = wandb.Settings(
        mode=mode,
        init_timeout=timeout,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
        # The user may have a W&B run in this process, which goes on.
        reinit="create_new",
        # Seconds of values that a killed process loses.
        x_transaction_log_flush_interval=2.0,
        # Numbers only: no captured output, code, git state, facts of the machine or packages.
        console="off",
        save_code=False,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
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
