"""The log: one line per step whatever happens, silence off the main process, and W&B that never
gets in the way.

W&B runs in a process of its own here: it starts threads, which the forked ranks of other tests
would not survive.
"""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from resnet_dist import log as log_module
from resnet_dist.config import LogConfig
from resnet_dist.log import build_log, read_metrics

QUIET = LogConfig(wandb="disabled")
TRAIN = {
    "train/epoch": 0.5,
    "train/loss": 1.25,
    "train/top1": 50.0,
    "train/lr": 0.1,
    "train/images_per_second": 1000.0,
    "train/data_wait_fraction": 0.02,
}


def started(folder, start_step=0, total_steps=100, config=QUIET, is_main=True):
    log = build_log(config, str(folder), is_main, {"seed": 1})
    log.start(start_step, total_steps)
    return log


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_plain_json(tmp_path):
    log = started(tmp_path)
    log.metrics(
        10,
        {
            "train/loss": math.nan,
            "train/top1": np.float32(50),
            "train/lr": math.inf,
            "val/num": np.int64(7),
        },
    )
    (record,) = lines(tmp_path)
    assert list(record)[:2] == ["step", "time"]
    assert abs(record["time"] - time.time()) < 60
    assert (record["train/loss"], record["train/top1"], record["train/lr"], record["val/num"]) == (
        None,
        50.0,
        None,
        7,
    )
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = started(tmp_path)
    for step in (10, 20, 30, 40):
        log.metrics(step, {"train/loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "tr')  # torn by SIGKILL
    log = started(tmp_path, start_step=20)
    assert [record["step"] for record in lines(tmp_path)] == [10, 20]
    log.metrics(30, {"train/loss": 2.0})
    assert [record["step"] for record in lines(tmp_path)] == [10, 20, 30]
    started(tmp_path, start_step=0)
    assert lines(tmp_path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_unwritable_file_is_warned_about_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    log = started(tmp_path)
    log.metrics(1, {"train/loss": 1.0})
    log.metrics(2, {"train/loss": 1.0})
    assert capsys.readouterr().err.count("warning") == 1
    (tmp_path / "metrics.jsonl").rmdir()
    log.metrics(3, {"train/loss": 1.0})
    assert [record["step"] for record in lines(tmp_path)] == [3]


def test_an_evaluation_that_comes_again_is_not_kept_twice(tmp_path):
    """Killed between the line of an evaluation and the checkpoint that knows of it."""
    for evaluated, steps in ((False, [12]), (True, [12, 12])):
        log = started(tmp_path / str(evaluated))
        log.metrics(12, TRAIN)
        log.metrics(12, {"val/top1": 50.0})
        again = build_log(QUIET, str(tmp_path / str(evaluated)), True, {})
        again.start(12, 100, evaluated)
        assert [record["step"] for record in lines(tmp_path / str(evaluated))] == steps


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always full device")
def test_full_disk_does_not_stop_training(tmp_path, capsys):
    log = started(tmp_path)
    log.metrics(1, {"train/loss": 1.0})
    log.path = Path("/dev/full")
    log.metrics(2, {"train/loss": 1.0})
    log.metrics(3, {"train/loss": 1.0})
    log.path = tmp_path / "metrics.jsonl"
    with open(log.path, "a") as file:
        file.write('{"step": 2, "ti')  # the part that still fitted
    log.metrics(4, {"train/loss": 1.0})
    assert capsys.readouterr().err.count("No space left") == 1
    assert [record["step"] for record in read_metrics(log.path)] == [1, 4]


def test_console_lines(tmp_path, capsys):
    log = started(tmp_path, total_steps=2000)
    log.metrics(50, TRAIN)
    log.metrics(1000, TRAIN)
    log.metrics(
        1000,
        {
            "train/epoch": 0.5,
            "val/loss": 1.0,
            "val/top1": 76.5,
            "val/top5": 93.0,
            "val/num": 360,
            "val_ema/loss": 0.9,
            "val_ema/top1": 77.0,
            "val_ema/top5": 94.0,
            "val_ema/num": 360,
        },
    )
    log.say("a sentence")
    first, second, val, ema, sentence = capsys.readouterr().out.splitlines()
    assert len(first) == len(second) <= 130
    for part in (
        "step   50/2000",
        "epoch   0.50",
        "loss  1.2500",
        "top1  50.00 %",
        "1000 img/s",
        "wait   2.0 %",
        "eta 0:00",
    ):
        assert part in first
    assert "val " in val
    assert "top1  76.50 %" in val
    assert "(360 images)" in val
    assert "val_ema" in ema
    assert val.index("top1") == ema.index("top1") == first.index("top1")
    assert sentence == "a sentence"


def test_progress_bar_where_there_is_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_module, "_is_terminal", lambda stream: True)
    log = started(tmp_path, start_step=10, config=LogConfig(wandb="disabled", progress_bar=True))
    log.progress(12)
    log.metrics(50, TRAIN)
    log.say("above the bar")
    log.close()
    out, err = capsys.readouterr()
    assert out == "above the bar\n"
    for part in ("50/100", "loss 1.250", "1000 img/s"):
        assert part in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_what_counts_as_a_terminal(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, open(tmp_path / "file", "w") as file:
        for size, is_terminal in (((0, 0), False), ((24, 80), True)):
            fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            assert log_module._is_terminal(terminal) == is_terminal
        assert not log_module._is_terminal(file)
    os.close(leader)


def test_silent_off_the_main_process(tmp_path, capsys):
    log = started(tmp_path / "none", config=LogConfig(wandb="offline"), is_main=False)
    log.progress(1)
    log.metrics(1, TRAIN)
    log.say("a")
    log.warn("b")
    log.close(1)
    assert log.wandb_location() == "none"
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "none").exists()


def test_closed_streams_do_not_matter(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        log = started(tmp_path)
        log.metrics(1, TRAIN)
        log.say("nobody listens")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.close()
    assert len(lines(tmp_path)) == 1


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
def test_mode(asked, environment, mode):
    assert log_module._wandb_mode(asked, environment) == mode


def test_probe_is_quick(monkeypatch):
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log_module, "_PROBE_SECONDS", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert log_module._accepts_connections(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert log_module._accepts_connections(
            "https://wandb.invalid"
        )  # the proxy looks up names, not we
    assert not log_module._accepts_connections(f"http://127.0.0.1:{port}")
    monkeypatch.delenv("https_proxy")

    asked, answer = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        asked.set()
        answer.wait()
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(log_module, "_PROBE_SECONDS", 0.2)
    assert not log_module._accepts_connections(
        "https://wandb.invalid"
    )  # although nothing has answered yet
    assert asked.wait(60)
    answer.set()


def test_netrc(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not log_module._netrc_key("https://api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert log_module._netrc_key("https://api.wandb.ai")
    assert not log_module._netrc_key("http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine machine\n")
    assert not log_module._netrc_key("https://api.wandb.ai")


def in_process(tmp_path, code, **environment):
    """Run `code` where W&B finds an empty home, and nothing outside this machine."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith("WANDB") and "proxy" not in key.lower()
    }
    clean |= {
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": str(Path(log_module.__file__).parents[1]),
        **environment,
    }
    head = "import os, sys, time\nfrom resnet_dist import log as m\nfrom resnet_dist.config import LogConfig\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done


SESSION = """
log = m.build_log(LogConfig(), "run", True, {"model": {"name": "resnet20"}})
log.start(int(sys.argv[1]) if len(sys.argv) > 1 else START, 100)
print("decided", flush=True)
for step in STEPS:
    log.metrics(step, {"train/epoch": step / 10, "train/loss": float(step), "train/top1": 1.0})
print("location", log.wandb_location())
log.close(0)
"""


def test_offline_run_goes_on_after_a_resume(tmp_path):
    pytest.importorskip("wandb")
    first = in_process(tmp_path, SESSION.replace("START", "0").replace("STEPS", "(10, 20, 30)"))
    assert first.stderr == ""  # no banner, no prompt
    (sentence,) = [line for line in first.stdout.splitlines() if line.startswith("W&B")]
    run_id = (tmp_path / "run/wandb_run_id").read_text().strip()
    assert "no API key" in sentence
    assert f"wandb sync run/wandb/offline-run-*-{run_id}" in sentence
    in_process(
        tmp_path,
        SESSION.replace("START", "20").replace("STEPS", "(30, 40)"),
        WANDB_API_KEY="a" * 40,
    )
    folders = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2
    records = [inspect(folder, tmp_path) for folder in folders]
    steps = [
        [record["history"]["item"]["step"] for record in part if record["type"] == "history"]
        for part in records
    ]
    assert steps == [[10, 20, 30], [40]]  # 30 is there already: the axis must not go back
    runs = [record["run"] for part in records for record in part if record["type"] == "run"]
    assert {run["run_id"] for run in runs} == {run_id}
    assert runs[0]["config"]["update"]["model"] == {"name": "resnet20"}
    assert all(
        record["metric"]["step_metric"] == "step"
        for record in records[0]
        if record["type"] == "metric" and "glob_name" in record["metric"]
    )
    assert [record["step"] for record in lines(tmp_path / "run")] == [10, 20, 30, 40]
    names = {path.name for folder in folders for path in folder.rglob("*")}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log"}


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
    if done.returncode:
        pytest.skip("this version of W&B has no tool to read its own files")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_key_without_a_network_goes_offline_at_once(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "config = LogConfig()\nfolder = m.Path('run')\nfolder.mkdir()\nimport wandb\n"
        "print(m.why_offline(probe=True))\n"
    )
    assert "cannot be reached" in in_process(tmp_path, code, WANDB_API_KEY="a" * 40).stdout


def test_server_that_does_not_answer_falls_back_to_offline(tmp_path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = "m._INIT_SECONDS, m._PROBE_SECONDS = 1.0, 60.0\n" + SESSION
        done = in_process(
            tmp_path,
            code.replace("START", "0").replace("STEPS", "(10,)"),
            WANDB_API_KEY="a" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
        )
    assert done.stdout.count("W&B is offline (going online failed") == 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1


class Broken:
    """A W&B run that fails in every call, once it is `released`."""

    def __init__(self, released):
        self.released = released

    def log(self, row):
        self.released.wait()
        raise RuntimeError("no space\nsecond line")

    def finish(self, exit_code):
        raise RuntimeError("gone")


@pytest.mark.parametrize("hang", [False, True])
def test_broken_wandb_gets_one_warning_and_no_time(tmp_path, monkeypatch, capsys, hang):
    monkeypatch.setattr(log_module, "_FINISH_SECONDS", -4.8)
    log = started(tmp_path)
    released = threading.Event()
    if not hang:
        released.set()
    log.wandb = log_module._Wandb(Broken(released), "somewhere", log)
    for step in range(1, 50):
        log.metrics(step, {"train/top5": 1.0})
    log.close()
    assert log.wandb.thread.is_alive() or not hang  # nobody has waited for it
    released.set()
    log.wandb.thread.join()
    assert capsys.readouterr().err.count("warning: W&B") == 1
    assert len(lines(tmp_path)) == 49


def test_no_wandb_installed_gets_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = started(tmp_path, config=LogConfig(wandb="auto"))
    log.metrics(1, TRAIN)
    log.close()
    assert capsys.readouterr().err.count("warning: W&B cannot be used") == 1
    assert len(lines(tmp_path)) == 1
