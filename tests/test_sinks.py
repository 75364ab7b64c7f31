"""Sinks: what each of them records, and that none of them can stop a training.

W&B runs in a process of its own here: it starts threads, which the forked ranks of other tests
would not survive.
"""

import csv
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dist_utils import logged_lines
from PIL import Image
from wandb_server import wandb_environment

from resnet_dist.config import LogConfig
from resnet_dist.evaluation.pictures import to_png
from resnet_dist.logs import log as log_module
from resnet_dist.logs.log import build_log
from resnet_dist.logs.sinks import background, wandb_mode
from resnet_dist.logs.sinks.base import Picture, Table


class Recorder:
    """A sink that keeps what it gets; `fail_in` names a method that raises, or blocks for ever."""

    name = "recorder"
    location = "somewhere"

    def __init__(self, fail_in="", hangs=False):
        self.fail_in = fail_in
        self.hangs = hangs
        self.rows = []
        self.attached = []
        self.exit_code = None
        self.calls = []
        self.never = threading.Event()

    def _enter(self, method):
        self.calls.append(method)
        if method == self.fail_in:
            if self.hangs:
                self.never.wait()
            raise RuntimeError("no space\nsecond line")

    def start(self, run):
        self._enter("start")

    def log(self, step, values):
        self._enter("log")
        self.rows.append((step, values))

    def attach(self, step, key, item):
        self._enter("attach")
        self.attached.append((step, key, item))

    def close(self, exit_code):
        self._enter("close")
        self.exit_code = exit_code


def run_with(sink, folder, monkeypatch, steps=49):
    """Log `steps` steps to `sink`, and end with exit code 7; returns the log."""
    monkeypatch.setattr(log_module, "build_sinks", lambda config: [sink])
    log = build_log(LogConfig(), str(folder), True, {})
    log.start(0, 100)
    for step in range(1, steps + 1):
        log.metrics(step, {"train/loss": float(step), "ranks/step_seconds": [1.0, 2.0]})
    log.close(7)
    return log


def test_a_sink_gets_the_numbers_and_the_exit_code(tmp_path, monkeypatch):
    sink = Recorder()
    log = run_with(sink, tmp_path, monkeypatch, steps=3)
    # Lists, with a value per rank, stay in metrics.jsonl.
    assert sink.rows == [
        (1, {"train/loss": 1.0}),
        (2, {"train/loss": 2.0}),
        (3, {"train/loss": 3.0}),
    ]
    assert sink.exit_code == 7
    assert log.locations() == {"recorder": "somewhere"}


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("method", ["start", "log", "close"])
def test_a_sink_that_fails_or_hangs_gets_one_warning(tmp_path, monkeypatch, capsys, method, hangs):
    seconds = 300.0
    reason = "RuntimeError: no space"
    if hangs:
        seconds = 0.5
        reason = "it did not finish in time"
    monkeypatch.setattr(log_module, "CLOSE_SECONDS", seconds)
    monkeypatch.setattr(background, "_LOCATION_SECONDS", 0.1)
    sink = Recorder(method, hangs)
    run_with(sink, tmp_path, monkeypatch)
    expected = f"warning: recorder failed ({reason}); training continues without it\n"
    assert capsys.readouterr().err == expected
    assert len(logged_lines(tmp_path)) == 49


def test_a_sink_that_hangs_does_not_fill_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, "_MOST_WAITING_ROWS", 10)
    monkeypatch.setattr(log_module, "CLOSE_SECONDS", 0.1)
    run_with(Recorder("start", hangs=True), tmp_path, monkeypatch)
    assert "has not taken a value for a long time" in capsys.readouterr().err
    assert len(logged_lines(tmp_path)) == 49


def test_attachments_reach_each_sink_after_the_numbers(tmp_path, monkeypatch):
    sink = Recorder()
    monkeypatch.setattr(log_module, "build_sinks", lambda config: [sink])
    log = build_log(LogConfig(), str(tmp_path), True, {})
    log.start(0, 100)
    log.metrics(1, {"val/top1": 10.0})
    log.attach(1, "val/predictions", Table(["path"], [["a.png"]]))
    log.close(0)
    assert sink.calls == ["start", "log", "attach", "close"]
    [(step, key, table)] = sink.attached
    assert step == 1
    assert key == "val/predictions"
    assert table == Table(["path"], [["a.png"]])


def session(folder, start_step, stop_step, sinks, attach=False):
    """Log the steps after `start_step` up to `stop_step`; every second one is evaluated.

    Args:
        folder: The output folder.
        start_step: The step at which the training starts or is resumed.
        stop_step: The last step.
        sinks: The names of the sinks.
        attach: Whether a picture and a table are attached to the last step.
    """
    log = build_log(LogConfig(sinks=sinks), str(folder), True, {"seed": 1})
    log.start(start_step, 100)
    for step in range(start_step + 1, stop_step + 1):
        log.metrics(step, {"train/loss": float(step), "train/epoch": step / 10})
        if step % 2 == 0:
            log.metrics(step, {"val/loss": 1.0, "val/top1": 10.0 * step})
    if attach:
        png = to_png(Image.new("RGB", (6, 4)))
        log.attach(stop_step, "samples", Picture(png, "a caption"))
        log.attach(stop_step, "val/predictions", Table(["path"], [["a.png"]]))
    log.close(0)


def test_csv_has_each_step_once_and_a_column_for_each_key(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "CLOSE_SECONDS", 300.0)
    session(tmp_path, 0, 3, ("csv",))
    session(tmp_path, 2, 4, ("csv",))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "train/loss", "train/epoch", "val/loss", "val/top1"]
    found = [(row["step"], row["train/loss"], row["val/top1"]) for row in rows]
    assert found == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("2", "", "20.0"),
        ("3", "3.0", ""),
        ("4", "4.0", ""),
        ("4", "", "40.0"),
    ]


def test_tensorboard_has_each_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(log_module, "CLOSE_SECONDS", 300.0)
    session(tmp_path, 0, 3, ("tensorboard",))
    session(tmp_path, 2, 4, ("tensorboard",), attach=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [event.step for event in events.Scalars("val/top1")] == [2, 4]
    [image] = events.Images("samples")
    assert image.step == 4
    assert image.width == 6
    assert image.height == 4


@pytest.mark.parametrize(
    ("sink", "module", "advice"),
    [
        ("tensorboard", "tensorboard", "pip install resnet-dist[tensorboard]"),
        ("wandb", "wandb", "pip install wandb, or --log.wandb disabled"),
    ],
)
def test_a_library_that_is_not_installed_gets_one_clear_warning(
    tmp_path, monkeypatch, capsys, sink, module, advice
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(log_module, "CLOSE_SECONDS", 300.0)
    session(tmp_path, 0, 3, (sink,))
    printed = capsys.readouterr().err
    assert printed.count("warning:") == 1
    assert advice in printed
    assert len(logged_lines(tmp_path)) == 4


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", "", "auto"),
        ("auto", "offline", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "dryrun", "offline"),
        ("auto", "online", "online"),
        ("online", "offline", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "nonsense", "online"),
    ],
)
def test_the_environment_limits_the_mode_of_wandb(asked, environment, mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_mode.wandb_mode(asked) == mode


NOBODY = "http://127.0.0.1:9"
"""An address of this machine that nobody listens on."""


def run_session(folder, start_step, steps, mode="auto", init_seconds=10.0, url=NOBODY, **more):
    """Log in a process where W&B finds an empty home, and nothing outside this machine."""
    words = [mode, init_seconds, start_step, *steps]
    done = subprocess.run(
        [sys.executable, "-c", SESSION, *map(str, words)],
        cwd=folder,
        env=wandb_environment(folder, url, **more),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done


SESSION = """
import os
import sys
from pathlib import Path

from PIL import Image

from resnet_dist.config import LogConfig
from resnet_dist.evaluation.pictures import to_png
from resnet_dist.logs import log as log_module
from resnet_dist.logs.sinks import wandb as wandb_sink
from resnet_dist.logs.sinks.base import CheckpointFile, ConfusionMatrix, Picture, Table

mode, init_seconds, start_step, *steps = sys.argv[1:]
wandb_sink._INIT_SECONDS[mode] = float(init_seconds)
log_module.CLOSE_SECONDS = 200
own_run = None
if "OWN_RUN" in os.environ:
    import wandb

    own_run = wandb.init(mode="offline", dir="own")
log = log_module.build_log(LogConfig(wandb=mode), "run", True, {"model": {"name": "resnet20"}})
log.start(int(start_step), 100)
for step in map(int, steps):
    log.metrics(step, {"train/epoch": step / 10, "train/loss": float(step), "train/top1": 1.0})
if log.start_step == 0:
    Path("best.pt").write_bytes(b"weights")
    log.attach(30, "samples", Picture(to_png(Image.new("RGB", (6, 4))), "a caption"))
    log.attach(30, "val/predictions", Table(["path", "loss"], [["a.png", 0.5]]))
    log.attach(30, "val/confusion", ConfusionMatrix([0, 1], [1, 1], ["cat", "dog"]))
    log.attach(30, "best", CheckpointFile(Path("best.pt").resolve(), "a_run", {"top1": 90.0}))
log.close(0)
if own_run is not None:
    assert wandb.run is own_run
    own_run.log({"own": 1})
    own_run.finish()
"""


def of_type(records, kind):
    """The contents of the records of this kind."""
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_offline_run_goes_on_after_a_resume(tmp_path):
    first = run_session(tmp_path, 0, (10, 20, 30))
    assert first.stderr == "", "no banner, no prompt"
    [sentence] = [line for line in first.stdout.splitlines() if line.startswith("W&B")]
    run_id = (tmp_path / "run/wandb_run_id").read_text().strip()
    assert "no API key" in sentence
    assert sentence.endswith("to upload later: wandb sync run/wandb")

    # A W&B run of the user in the same process goes on, and decides whether ours is online.
    (tmp_path / "own").mkdir()
    second = run_session(tmp_path, 20, (30, 40), WANDB_API_KEY="a" * 40, OWN_RUN="yes")
    assert "W&B is offline (as the active W&B run of this process)" in second.stdout
    (own_folder,) = (tmp_path / "own/wandb").glob("offline-run-*")
    own_rows = of_type(inspect(own_folder, tmp_path), "history")
    assert len(own_rows) == 1

    wandb_folder = tmp_path / "run/wandb"
    first_folder, second_folder = sorted(wandb_folder.glob(f"offline-run-*-{run_id}"))
    first_records = inspect(first_folder, tmp_path)
    second_records = inspect(second_folder, tmp_path)
    first_steps = [row["item"]["step"] for row in of_type(first_records, "history")]
    second_steps = [row["item"]["step"] for row in of_type(second_records, "history")]
    # The picture, the table and the matrix are at step 30 too.
    assert first_steps == [10, 20, 30, 30, 30, 30]
    # Step 30 is there already: the axis must not go back.
    assert second_steps == [40]
    assert [record["step"] for record in logged_lines(tmp_path / "run")] == [10, 20, 30, 40]

    first_runs = of_type(first_records, "run")
    assert first_runs[0]["config"]["update"]["model"] == {"name": "resnet20"}
    for run in first_runs + of_type(second_records, "run"):
        assert run["run_id"] == run_id
    metrics = of_type(first_records, "metric")
    steps_of_globs = [metric["step_metric"] for metric in metrics if "glob_name" in metric]
    assert set(steps_of_globs) == {"step"}

    artifacts = of_type(first_records + second_records, "artifact")
    [model] = [artifact for artifact in artifacts if artifact["type"] == "model"]
    assert model["name"] == "a_run"
    assert json.loads(model["metadata"]) == {"top1": 90.0}

    # The picture and the table are there; nothing about this machine is.
    files = [*first_folder.rglob("*"), *second_folder.rglob("*")]
    suffixes_of_media = {path.suffix for path in files if "media" in path.parts}
    assert ".png" in suffixes_of_media
    assert ".json" in suffixes_of_media
    names = {path.name for path in files}
    about_the_machine = {"requirements.txt", "wandb-metadata.json", "output.log"}
    assert names.isdisjoint(about_the_machine)


def inspect(folder, home):
    """The records of an offline run, as W&B's own tool prints them."""
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [tool, "leet", "inspect", "--json", folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_server_that_does_not_answer_falls_back_to_offline(tmp_path, mode):
    """With a key in the environment (auto) or in the netrc file (online)."""
    key = "a" * 40
    environment = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, port = server.getsockname()
        if mode == "auto":
            environment["WANDB_API_KEY"] = key
        else:
            entry = f"machine 127.0.0.1:{port} login user password {key}\n"
            (tmp_path / ".netrc").write_text(entry)
        done = run_session(
            tmp_path,
            0,
            (10,),
            mode,
            init_seconds=1.0,
            url=f"http://127.0.0.1:{port}",
            **environment,
        )
    assert done.stdout.count("W&B is offline") == 1
    assert "going online failed" in done.stdout
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
