"""The metrics of a run for Weights & Biases.

It never asks the user a question. The run is online if there is an API key and the server answers,
and otherwise in wandb's own offline mode. A resumed run continues the same W&B run, whose id is in
the file `wandb_run_id`.
"""

import contextlib
import os
import secrets
import shlex
import time
import urllib.error
import urllib.request
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from resnet_dist.files import write_file
from resnet_dist.sinks.background import describe_error
from resnet_dist.sinks.base import Numbers, RunInfo
from resnet_dist.text import printable

if TYPE_CHECKING:
    from wandb import Run

# The server has to answer one request within this time, or the run is offline.
_PROBE_SECONDS = 3.0

# wandb's own limits for the start of an online run, and for sending what is left at the end.
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 30.0

# From the strictest to the most permissive; WANDB_MODE can only restrict the config.
_MODES = ("disabled", "offline", "online")
_OLD_NAMES_OF_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}


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
                self._run = _init_wandb(run, "online", run_id)
                self.location = str(self._run.url)
                run.say(f"W&B: {self.location}")
                return
            except Exception as error:
                reason = f"going online failed: {describe_error(error)}"
                # The failed attempt still holds the id of the run.
                wandb.teardown(exit_code=1)
        self._run = _init_wandb(run, "offline", run_id)
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


def wandb_mode(configured: str) -> str:
    """Combine the key `log.wandb` with the environment variable WANDB_MODE.

    WANDB_MODE decides if the config says auto. Otherwise it can only restrict the config.

    Args:
        configured: The value of `log.wandb`.

    Returns:
        "auto", "online", "offline" or "disabled".
    """
    variable = os.environ.get("WANDB_MODE", "")
    named = _OLD_NAMES_OF_MODES.get(variable, variable)
    if named not in _MODES:
        return configured
    if configured == "auto":
        return named
    return min(configured, named, key=_MODES.index)


def why_offline(mode: str) -> str:
    """Find out why a run cannot be online. This takes a few seconds at most.

    Args:
        mode: A result of `wandb_mode`.

    Returns:
        The reason; empty if the run can be online.

    Raises:
        ImportError: wandb is not installed.
    """
    if mode == "offline":
        return "as configured"
    import wandb

    # From the environment and wandb's settings files.
    settings = wandb.setup().settings
    url = settings.base_url
    has_key = settings.api_key or settings.identity_token_file or _has_netrc_key(url)
    if not has_key:
        return f"no API key for {url}; `wandb login` stores one"
    if mode == "auto" and not _answers(url):
        return f"{url} cannot be reached"
    return ""


def _init_wandb(run: RunInfo, mode: str, run_id: str) -> "Run":
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
        "init_timeout": _INIT_SECONDS,
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


def _has_netrc_key(base_url: str) -> bool:
    """Whether the netrc file, where `wandb login` stores keys, has a password for this server."""
    path = os.environ.get("NETRC") or "~/.netrc"
    with contextlib.suppress(OSError, NetrcParseError):
        entry = netrc(os.path.expanduser(path)).authenticators(urlsplit(base_url).netloc)
        return entry is not None and bool(entry[2])
    return False


def _answers(url: str) -> bool:
    """Whether the server answers a request, through the proxy of the environment if there is one.

    Any answer counts, also an error or a certificate that Python does not know.
    """
    try:
        urllib.request.build_opener().open(url, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        return "certificate" in str(error).lower()
    return True
