"""One place where a run speaks: console or progress bar, metrics.jsonl, and Weights & Biases.

Everything here does nothing off the main process, and nothing here may end a training: what cannot be written is
warned about once. metrics.jsonl is the source for reports; W&B gets the same numbers.
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
import tempfile
import threading
import time
import urllib.request
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
        self.start_step = self.total_steps = 0
        self.started = time.monotonic()
        self.bar = self.wandb = None
        self.torn = False                # whether the file may end in half a line
        self.warned: set[str] = set()
        self.sent: dict[str, int] = {}   # for each key, the step up to which W&B has it from an earlier process

    def start(self, start_step: int, total_steps: int) -> None:
        """Training begins after `start_step` updates and is to end after `total_steps`.

        Lines of metrics.jsonl about later steps are dropped (an earlier process had got further than its checkpoint),
        so that the file has each step once. The progress bar and the W&B run begin here.
        """
        if not self.is_main:
            return
        self.start_step, self.total_steps, self.started = start_step, total_steps, time.monotonic()
        had_run = (self.folder / "wandb_run_id").is_file()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            last_steps = _drop_lines_after(self.path, start_step)
            self.sent = last_steps if had_run else {}
        except OSError as error:
            self._warn_once("metrics", f"metrics.jsonl cannot be prepared ({error}); training goes on")
        self.wandb = _start_wandb(self.config, self.folder, self.run_config, self)
        if self.config.progress_bar and _is_terminal(sys.stderr):
            from tqdm import tqdm

            tqdm.monitor_interval = 0    # its watching thread is of no use to a bar that is updated at every step
            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05,
                            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}")

    def progress(self, step: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def metrics(self, step: int, values: dict) -> None:
        """Record `values` ("train/loss": ..., "val/top1": ...) of update `step` everywhere."""
        if not self.is_main:
            return
        values = {key: _plain(value) for key, value in values.items()}
        self._write_line({"step": step, "time": round(time.time(), 3),
                          "elapsed": round(time.monotonic() - self.started, 3),
                          **{key: _json_safe(value) for key, value in values.items()}})
        if self.wandb is not None:
            # A resumed run repeats steps that W&B has already: its x axis must not go back.
            new = {key: value for key, value in values.items() if step > self.sent.get(key, -1)}
            if new:
                self.wandb.log({"step": step, **new})
        self.progress(step)
        if "train/loss" in values and self.bar is not None:
            self.bar.set_postfix_str(_bar_text(values))
        elif "train/loss" in values:
            self.say(_train_line(step, self.total_steps, values, self._eta(step)))
        for prefix in ("val", "val_ema"):
            if f"{prefix}/top1" in values:
                self.say(_val_line(step, self.total_steps, prefix, values))

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
        # ValueError: the stream is closed; OSError: its reader is gone or its disk is full. Neither is worth a run.
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

    def _eta(self, step: int) -> float:
        """Seconds to the end, at the mean pace so far, with evaluations and checkpoints in it."""
        done = step - self.start_step
        return (time.monotonic() - self.started) / done * (self.total_steps - step) if done > 0 else math.nan

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
            self._warn_once("metrics", f"{self.path} cannot be written ({error}); training goes on without these lines")


def build_log(config: LogConfig, output_dir: str, is_main: bool, run_config: dict) -> Log:
    """The log of a run in `output_dir`; silent unless `is_main`. `run_config` (plain values) goes to W&B."""
    return Log(config, output_dir, is_main, run_config)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order; lines that are not whole are left out. Raises OSError."""
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _drop_lines_after(path: Path, step: int) -> dict[str, int]:
    """Rewrite the file without lines after `step`, or without any at step 0; the last step that each key had before."""
    if not path.exists():
        return {}
    records = read_metrics(path)
    kept = [record for record in records if 0 < record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if text != path.read_bytes():
        descriptor, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, path.stat().st_mode & 0o777)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    last: dict[str, int] = {}
    for record in records:
        last |= {key: max(record["step"], last.get(key, -1)) for key in record}
    return last


def _is_terminal(stream) -> bool:
    """Whether `stream` is a terminal with a size: containers may have one of 0 x 0, where a bar shows nothing."""
    with contextlib.suppress(OSError, ValueError):
        return min(os.get_terminal_size(stream.fileno())) > 0        # OSError where it is no terminal at all
    return False


def _plain(value):
    """A number of any kind (numpy, torch) as Python's."""
    return value.item() if hasattr(value, "item") else value


def _json_safe(value):
    """`value`, or None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    """h:mm:ss, or a dash for what is not known yet."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _head(step: int, total_steps: int, values: dict) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}  epoch {values.get('train/epoch', math.nan):6.2f}"


def _train_values(values: dict) -> tuple:
    """Loss, top-1, learning rate, images per second, percent of the time that data was waited for."""
    names = ("loss", "top1", "lr", "images_per_second", "data_wait_fraction")
    loss, top1, lr, speed, wait = (values.get(f"train/{name}", math.nan) for name in names)
    return loss, top1, lr, speed, 100 * wait


def _train_line(step: int, total_steps: int, values: dict, eta: float) -> str:
    """One aligned line about the last log interval."""
    loss, top1, lr, speed, wait = _train_values(values)
    bad = f"  bad images {values['train/bad_images']}" if values.get("train/bad_images") else ""
    return (f"{_head(step, total_steps, values)}  train    loss {loss:7.4f}  top1 {top1:6.2f} %  lr {lr:8.3g}  "
            f"{speed:7.0f} img/s  wait {wait:5.1f} %  eta {_duration(eta)}{bad}")


def _val_line(step: int, total_steps: int, prefix: str, values: dict) -> str:
    """One aligned line about an evaluation."""
    loss, top1, top5 = (values.get(f"{prefix}/{name}", math.nan) for name in ("loss", "top1", "top5"))
    return (f"{_head(step, total_steps, values)}  {prefix:<7}  loss {loss:7.4f}  top1 {top1:6.2f} %  "
            f"top5 {top5:6.2f} %  ({values.get(f'{prefix}/num', '?')} images)")


def _bar_text(values: dict) -> str:
    """What the progress bar says beside the time that is left."""
    loss, top1, lr, speed, wait = _train_values(values)
    return (f"epoch {values.get('train/epoch', math.nan):.2f}, loss {loss:.3f}, top1 {top1:.1f} %, lr {lr:.3g}, "
            f"{speed:.0f} img/s, wait {wait:.0f} %")


class _Wandb:
    """A W&B run behind a thread: if W&B stalls, training does not."""

    def __init__(self, run, location: str, log: Log) -> None:
        self.run, self.location, self.owner = run, location, log
        self.rows: queue.Queue = queue.Queue(maxsize=10_000)
        self.exit_code = 0
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, row: dict) -> None:
        """Hand over one row; never waits."""
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.owner._warn_once("wandb", "W&B takes no more metrics; training goes on, metrics.jsonl has them")

    def _work(self) -> None:
        failed = False
        while (row := self.rows.get()) is not None:
            try:
                if not failed:
                    self.run.log(row)
            except Exception as error:       # W&B raises what it likes, and none of it matters to training
                failed = True
                self.owner._warn_once("wandb", f"W&B failed ({_first_line(error)}); training goes on without it")
        try:
            self.run.finish(exit_code=self.exit_code)
        except Exception as error:
            self.owner._warn_once("wandb", f"the W&B run could not be finished ({_first_line(error)})")

    def close(self, exit_code: int) -> None:
        """Send what is left, for a bounded time."""
        self.exit_code, deadline = exit_code, time.monotonic() + _FINISH_SECONDS
        with contextlib.suppress(queue.Full):
            self.rows.put(None, timeout=1)
        self.thread.join(_FINISH_SECONDS + 5)
        if time.monotonic() > deadline:
            folder = shlex.quote(str(self.owner.folder / "wandb"))
            self.owner._warn_once("wandb", f"W&B did not finish within {_FINISH_SECONDS:.0f} s; to upload later: "
                                           f"wandb sync --include-online {folder}/*run-*")


def _start_wandb(config: LogConfig, folder: Path, run_config: dict, log: Log) -> _Wandb | None:
    """The run, online or offline, or None with one warning at most."""
    mode = _wandb_mode(config.wandb, os.environ.get("WANDB_MODE", ""))
    if mode == "disabled":
        return None
    # W&B otherwise announces the credentials it found, and tries to report its own crashes, without a network too.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        run_id = _run_id(folder)
        later = f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*-{run_id}"
        reason = "as asked" if mode == "offline" else why_offline(probe=mode == "auto")
        if not reason:
            try:
                run = _init_wandb(wandb, "online", run_id, config, folder, run_config)
                log.say(f"W&B: {run.url}")
                return _Wandb(run, run.url, log)
            except Exception as error:
                reason = f"going online failed: {_first_line(error)}"
                wandb.teardown(exit_code=1)      # the failed attempt still holds the run's id
        run = _init_wandb(wandb, "offline", run_id, config, folder, run_config)
        log.say(f"W&B is offline ({reason}); to upload later: {later}")
        return _Wandb(run, f"{folder / 'wandb'} (upload: {later})", log)
    except Exception as error:
        log._warn_once("wandb", f"W&B cannot be used ({_first_line(error)}); training goes on without it "
                                f"(--log.wandb disabled says so from the start)")
        return None


def _wandb_mode(asked: str, environment: str) -> str:
    """auto, online, offline or disabled: the config's, which WANDB_MODE decides for auto and can only restrain else."""
    named = {"dryrun": "offline", "run": "online", "shared": "online"}.get(environment, environment)
    order = ("disabled", "offline", "online")
    if named not in order:
        return asked
    return named if asked == "auto" else min(asked, named, key=order.index)


def _init_wandb(wandb, mode: str, run_id: str, config: LogConfig, folder: Path, run_config: dict):
    """`wandb.init` without prompts, banners, code, packages, git state or captured output."""
    wanted = {"mode": mode, "silent": True, "console": "off", "save_code": False, "disable_code": True,
              "disable_git": True, "disable_job_creation": True, "x_disable_meta": True, "x_save_requirements": False,
              "init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS, "x_transaction_log_flush_interval": 2.0}
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
    run = wandb.init(project=config.wandb_project, entity=config.wandb_entity, dir=str(folder.absolute()), id=run_id,
                     name=config.wandb_name or folder.absolute().name, config=run_config, resume="allow",
                     settings=settings)
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
    """Why W&B cannot be online here, decided within two seconds and without a question; empty if it can."""
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings          # environment and settings files, as wandb.init reads them
    if not (settings.api_key or settings.identity_token_file or _netrc_key(settings.base_url)):
        return f"no API key for {settings.base_url}; `wandb login` stores one"
    if probe and not _accepts_connections(settings.base_url):
        return f"{settings.base_url} cannot be reached"
    return ""


def _netrc_key(base_url: str) -> bool:
    """Whether the netrc file has a password for this server; W&B looks for it in the same places."""
    for path in map(os.path.expanduser, [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]):
        with contextlib.suppress(OSError, NetrcParseError):
            entry = netrc(path).authenticators(urlsplit(base_url).netloc)
            if entry and entry[2]:
                return True
    return False


def _accepts_connections(url: str) -> bool:
    """Whether the server of `url`, or the proxy that leads to it, takes a TCP connection within a second."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError, ValueError, OverflowError):     # the last two: an address that cannot be one
            socket.create_connection(address, timeout=_PROBE_SECONDS).close()
            answered.set()

    # In a thread, since the look-up of the name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
