"""One place where a run speaks: console or progress bar, metrics.jsonl, and Weights & Biases.

Everything here does nothing off the main process, and nothing here may end a training: what cannot
be written is warned about once. metrics.jsonl is the source for reports; W&B gets the same numbers.
"""

import contextlib
import json
import math
import os
import queue
import secrets
import shlex
import socket
import sys
import threading
import time
import urllib.request
from datetime import timedelta
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from resnet_dist.config import LogConfig

_PROBE_SECONDS = 1.0
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 30.0


class Log:
    """Says and records what happens. `start` comes before the first `metrics`, `close` last."""

    def __init__(self, config: LogConfig, output_dir: str, is_main: bool, run_config: dict) -> None:
        self.config, self.is_main, self.run_config = config, is_main, run_config
        self.folder = Path(output_dir)
        self.path = self.folder / "metrics.jsonl"
        self.bar = self.wandb = None
        self.torn = False  # whether the file may end in half a line
        self.warned: set[str] = set()
        self.sent: dict[
            str, int
        ] = {}  # for each key, the step up to which W&B has it from an earlier process

    def start(self, start_step: int, total_steps: int, evaluated: bool = True) -> None:
        """Training begins after `start_step` updates, `evaluated` or not, and is to end after
        `total_steps`.

        Lines of metrics.jsonl about what comes again are dropped (an earlier process had got
        further than its checkpoint), so that the file has each step once. The progress bar and the
        W&B run begin here.
        """
        if not self.is_main:
            return
        self.start_step, self.total_steps, self.started = start_step, total_steps, time.monotonic()
        had_run = (self.folder / "wandb_run_id").is_file()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            last_steps = _drop_lines_after(self.path, start_step, evaluated)
            if had_run:
                self.sent = last_steps
        except OSError as error:
            self._warn_once(
                "metrics", f"metrics.jsonl cannot be prepared ({error}); training goes on"
            )
        self.wandb = _start_wandb(self)
        if self.config.progress_bar and _is_terminal(sys.stderr):
            from tqdm import tqdm

            tqdm.monitor_interval = (
                0  # its watching thread is of no use to a bar that is updated at every step
            )
            self.bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def progress(self, step: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def metrics(self, step: int, values: dict) -> None:
        """Record `values` ("train/loss": ..., "val/top1": ...) of update `step` everywhere."""
        if not self.is_main:
            return
        # Numbers of numpy and torch become Python's; JSON has none for what is not finite.
        values = {
            key: value.item() if hasattr(value, "item") else value for key, value in values.items()
        }
        self._write_line(
            {
                "step": step,
                "time": round(time.time(), 3),
                "elapsed": round(time.monotonic() - self.started, 3),
                **{
                    key: None if isinstance(value, float) and not math.isfinite(value) else value
                    for key, value in values.items()
                },
            }
        )
        # A resumed run repeats steps that W&B has already: its x axis must not go back.
        new = {key: value for key, value in values.items() if step > self.sent.get(key, -1)}
        if self.wandb is not None and new:
            self.wandb.log({"step": step, **new})
        self.progress(step)
        for prefix in ("train", "val", "val_ema"):
            if f"{prefix}/loss" in values:
                self._tell(step, prefix, values)

    def _tell(self, step: int, prefix: str, values: dict) -> None:
        """Loss, top-1 and so on of the last log interval ("train") or an evaluation, as a line or
        beside the bar.
        """
        text = _aligned(prefix, values)
        if prefix == "train" and self.bar is not None:
            self.bar.set_postfix_str(" ".join(text.split()))
            return
        if prefix == "train":  # at the mean pace so far, with evaluations and checkpoints in it
            pace = (time.monotonic() - self.started) / max(1, step - self.start_step)
            text += f"  eta {timedelta(seconds=round(pace * (self.total_steps - step)))}"
        self.say(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {text}")

    def say(self, text: str) -> None:
        """A sentence to the user, above the progress bar."""
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """A sentence that the user should not miss."""
        self._print(f"warning: {text}", sys.stderr)

    def wandb_location(self) -> str:
        """Where the W&B run is: its address, its folder, or why there is none."""
        return self.wandb.location if self.wandb is not None else "none"

    def close(self, exit_code: int = 0) -> None:
        """End the bar and the W&B run; returns within half a minute or so whatever W&B does."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb is not None:
            self.wandb.close(exit_code)

    def _print(self, text: str, file) -> None:
        if not self.is_main:
            return
        # ValueError: the stream is closed; OSError: its reader is gone or its disk is full. Neither
        # is worth a run.
        with contextlib.suppress(OSError, ValueError):
            if self.bar is not None:
                self.bar.write(text, file=file)
            else:
                print(text, file=file)
            file.flush()

    def _warn_once(self, topic: str, text: str) -> None:
        if topic not in self.warned:
            self.warned.add(topic)
            self.warn(text)

    def _write_line(self, record: dict) -> None:
        """Append one line. The file is opened for each: a full disk or a lost mount may come back."""
        line = (b"\n" if self.torn else b"") + json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                self.torn = True
                if file.write(line) != len(line):
                    raise OSError("only a part of the line could be written")
                self.torn = False
        except OSError as error:
            self._warn_once(
                "metrics",
                f"{self.path} cannot be written ({error}); training goes on without these lines",
            )


def build_log(config: LogConfig, output_dir: str, is_main: bool, run_config: dict) -> Log:
    """The log of a run in `output_dir`; silent unless `is_main`. `run_config` (plain values) goes
    to W&B.
    """
    return Log(config, output_dir, is_main, run_config)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order; lines that are not whole are left out. Raises
    OSError.
    """
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _drop_lines_after(path: Path, step: int, evaluated: bool) -> dict[str, int]:
    """Rewrite the file without lines after `step`, or without any at step 0; the last step that
    each key had before.

    Unless the state of `step` is known to be `evaluated`, its evaluation comes again, too.
    """
    if not path.exists():
        return {}
    records = read_metrics(path)
    kept = [
        record
        for record in records
        if 0 < record["step"] < step + (evaluated or "val/top1" not in record)
    ]
    text = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if text != path.read_bytes():
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return {key: record["step"] for record in records for key in record}


def _is_terminal(stream) -> bool:
    """Whether `stream` is a terminal with a size: containers may have one of 0 x 0, where a bar
    shows nothing.
    """
    with contextlib.suppress(OSError, ValueError):
        return (
            min(os.get_terminal_size(stream.fileno())) > 0
        )  # OSError where it is no terminal at all
    return False


def _aligned(prefix: str, values: dict) -> str:
    """What the console says of the last log interval (`prefix` "train") or an evaluation; speed is
    in images/s.
    """

    def get(name: str) -> float:
        return values.get(f"{prefix}/{name}", math.nan)

    text = (
        f"epoch {values.get('train/epoch', math.nan):6.2f}  {prefix:<7}  loss {get('loss'):7.4f}  "
        f"top1 {get('top1'):6.2f} %  "
    )
    if prefix != "train":
        if f"{prefix}/top5" in values:
            text += f"top5 {get('top5'):6.2f} %  "
        return f"{text}({get('num')} images)"
    bad = f"  bad images {values['train/bad_images']}" if values.get("train/bad_images") else ""
    return (
        f"{text}lr {get('lr'):8.3g}  {get('images_per_second'):7.0f} img/s  "
        f"wait {100 * get('data_wait_fraction'):5.1f} %{bad}"
    )


class _Wandb:
    """A W&B run behind a thread: if W&B stalls, training does not."""

    def __init__(self, run, location: str, log: Log) -> None:
        self.run, self.location, self.owner = run, location, log
        self.rows: queue.SimpleQueue = queue.SimpleQueue()
        self.exit_code = 1  # until `close` knows better
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, row: dict) -> None:
        """Hand over one row; never waits."""
        self.rows.put(row)

    def _work(self) -> None:
        try:
            try:
                while (row := self.rows.get()) is not None:
                    self.run.log(row)
            finally:
                self.run.finish(exit_code=self.exit_code)
        except Exception as error:  # W&B raises what it likes, and none of it matters to training
            self.owner._warn_once(
                "wandb", f"W&B failed ({_first_line(error)}); training goes on without it"
            )

    def close(self, exit_code: int) -> None:
        """Send what is left, for a bounded time."""
        self.exit_code, deadline = exit_code, time.monotonic() + _FINISH_SECONDS
        self.rows.put(None)
        self.thread.join(_FINISH_SECONDS + 5)
        if time.monotonic() > deadline:
            folder = shlex.quote(str(self.owner.folder / "wandb"))
            self.owner._warn_once(
                "wandb",
                f"W&B did not finish within {_FINISH_SECONDS:.0f} s; to upload later: "
                f"wandb sync --include-online {folder}/*run-*",
            )


def _start_wandb(log: Log) -> _Wandb | None:
    """The run, online or offline, or None with one warning at most."""
    mode = _wandb_mode(log.config.wandb, os.environ.get("WANDB_MODE", ""))
    if mode == "disabled":
        return None
    # W&B otherwise announces the credentials it found, and tries to report its own crashes, without
    # a network too.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        run_id = _run_id(log.folder)
        reason = "as asked" if mode == "offline" else why_offline(probe=mode == "auto")
        if not reason:
            try:
                run = _init_wandb(log, "online", run_id)
                log.say(f"W&B: {run.url}")
                return _Wandb(run, run.url, log)
            except Exception as error:
                reason = f"going online failed: {_first_line(error)}"
                wandb.teardown(exit_code=1)  # the failed attempt still holds the run's id
        run = _init_wandb(log, "offline", run_id)
        later = f"wandb sync {shlex.quote(str(log.folder / 'wandb'))}/offline-run-*-{run_id}"
        log.say(f"W&B is offline ({reason}); to upload later: {later}")
        return _Wandb(run, f"{log.folder / 'wandb'} (upload: {later})", log)
    except Exception as error:
        log._warn_once(
            "wandb",
            f"W&B cannot be used ({_first_line(error)}); training goes on without it "
            f"(--log.wandb disabled says so from the start)",
        )
        return None


def _wandb_mode(asked: str, environment: str) -> str:
    """auto, online, offline or disabled: the config's, which WANDB_MODE decides for auto and can
    only restrain else.
    """
    named = {"dryrun": "offline", "run": "online", "shared": "online"}.get(environment, environment)
    order = ("disabled", "offline", "online")
    if named not in order:
        return asked
    return named if asked == "auto" else min(asked, named, key=order.index)


def _init_wandb(log: Log, mode: str, run_id: str):
    """`wandb.init` without prompts, banners, code, packages, git state or captured output."""
    import wandb

    wanted = {
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
    settings = wandb.Settings(
        **{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    )
    folder, config = log.folder.absolute(), log.config
    run = wandb.init(
        project=config.wandb_project,
        entity=config.wandb_entity,
        name=config.wandb_name or folder.name,
        dir=str(folder),
        id=run_id,
        config=log.run_config,
        resume="allow",
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(folder: Path) -> str:
    """The id of this folder's W&B run, made up once: a resumed job continues the same run."""
    path = folder / "wandb_run_id"
    known = path.read_text().strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known


def why_offline(probe: bool) -> str:
    """Why W&B cannot be online here, decided within two seconds and without a question; empty if it
    can.
    """
    from wandb.sdk import wandb_setup

    settings = (
        wandb_setup.singleton().settings
    )  # environment and settings files, as wandb.init reads them
    if not (settings.api_key or settings.identity_token_file or _netrc_key(settings.base_url)):
        return f"no API key for {settings.base_url}; `wandb login` stores one"
    if probe and not _accepts_connections(settings.base_url):
        return f"{settings.base_url} cannot be reached"
    return ""


def _netrc_key(base_url: str) -> bool:
    """Whether the netrc file, where W&B keeps keys too, has a password for this server."""
    with contextlib.suppress(OSError, NetrcParseError):
        keys = netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"))
        entry = keys.authenticators(urlsplit(base_url).netloc)
        return bool(entry and entry[2])
    return False


def _accepts_connections(url: str) -> bool:
    """Whether the server of `url`, or the proxy that leads to it, takes a TCP connection within a
    second.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(
            OSError, ValueError, OverflowError
        ):  # the last two: an address that cannot be one
            socket.create_connection(address, timeout=_PROBE_SECONDS).close()
            answered.set()

    # In a thread, since the look-up of the name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
