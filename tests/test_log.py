"""The log: one line per step whatever happens, and silence outside the main process."""

import math
import os
import sys
import time

import numpy as np
import pytest
from dist_utils import logged_lines

from resnet_dist.config import LogConfig
from resnet_dist.logs import console
from resnet_dist.logs.log import build_log

QUIET = LogConfig(wandb="disabled")
TRAIN = {
    "train/epoch": 0.5,
    "train/loss": 1.25,
    "train/top1": 50.0,
    "train/lr": 0.1,
    "train/images_per_second": 1000.0,
    "train/data_wait_fraction": 0.02,
}


def started(folder, start_step=0, total_steps=100, config=QUIET, is_main=True, evaluated=True):
    """The log of a run that goes on from `start_step`.

    `evaluated` says whether the checkpoint of that step knows of its evaluation.
    """
    log = build_log(config, str(folder), is_main, {"seed": 1})
    log.start(start_step, total_steps, evaluated)
    return log


def steps(folder):
    """The step of each line of metrics.jsonl."""
    return [line["step"] for line in logged_lines(folder)]


def test_lines_are_plain_json(tmp_path):
    log = started(tmp_path)
    before = time.time()
    log.metrics(
        10,
        {
            "train/loss": math.nan,
            "train/top1": np.float32(50),
            "train/lr": math.inf,
            "val/num": np.int64(7),
        },
    )
    after = time.time()
    [record] = logged_lines(tmp_path)
    assert list(record)[:2] == ["step", "time"]
    rounding = 0.01
    assert before - rounding <= record["time"] <= after + rounding
    assert record["train/loss"] is None
    assert record["train/top1"] == 50.0
    assert record["train/lr"] is None
    assert record["val/num"] == 7
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = started(tmp_path)
    for step in (10, 20, 30, 40):
        log.metrics(step, {"train/loss": 1.0})
    # Torn by SIGKILL.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "tr')

    log = started(tmp_path, start_step=20)
    assert steps(tmp_path) == [10, 20]
    log.metrics(30, {"train/loss": 2.0})
    assert steps(tmp_path) == [10, 20, 30]

    started(tmp_path, start_step=0)
    assert logged_lines(tmp_path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_unwritable_file_is_warned_about_once(tmp_path, capsys):
    """A folder is in its place. Once it is gone, nothing is missing from the file."""
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    log = started(tmp_path)
    log.metrics(1, {"train/loss": 1.0})
    log.metrics(2, {"train/loss": 1.0})
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1

    path.rmdir()
    log.metrics(3, {"train/loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]


def test_lines_that_wait_for_the_disk_are_written_at_the_end(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = started(tmp_path)
    path.mkdir()
    log.metrics(1, {"train/loss": 1.0})
    log.close()
    assert "the last lines of" in capsys.readouterr().err
    path.rmdir()
    log.close()
    assert steps(tmp_path) == [1]


def test_a_superseded_process_does_not_log(tmp_path, capsys):
    """Not an evaluation either; its lines would be in the file a second time."""

    def superseded():
        raise ValueError("belongs to a newer attempt")

    log = started(tmp_path)
    log.metrics(1, TRAIN)
    log.file._check_claim = superseded
    for values in (TRAIN, {"val/loss": 1.0, "val/top1": 50.0}):
        with pytest.raises(ValueError, match="newer attempt"):
            log.metrics(2, values)
    log.close(2)
    assert steps(tmp_path) == [1]
    assert "warning" not in capsys.readouterr().err


def test_an_evaluation_that_comes_again_is_not_kept_twice(tmp_path):
    """Killed between the line of an evaluation and the checkpoint that knows of it."""
    for evaluated, expected in ((False, [12]), (True, [12, 12])):
        folder = tmp_path / str(evaluated)
        log = started(folder)
        log.metrics(12, TRAIN)
        log.metrics(12, {"val/top1": 50.0})
        started(folder, start_step=12, evaluated=evaluated)
        assert steps(folder) == expected


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
    assert len(first) == len(second)
    assert len(first) <= 130
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
    column = first.index("top1")
    assert val.index("top1") == column
    assert ema.index("top1") == column
    assert sentence == "a sentence"


@pytest.mark.parametrize("stdout_is_a_terminal", [True, False])
def test_training_lines_are_where_the_user_looks(
    tmp_path, monkeypatch, capsys, stdout_is_a_terminal
):
    """In the bar alone, and in standard output too if that is a file."""
    shown = []

    def is_terminal(stream):
        return stream is sys.stderr or stdout_is_a_terminal

    def note_figures(bar, figures):
        shown.append(figures)

    monkeypatch.setattr(console, "is_terminal", is_terminal)
    monkeypatch.setattr(console.StatusBar, "show", note_figures)
    log = started(tmp_path, start_step=10, config=LogConfig(wandb="disabled"))
    log.progress(12)
    log.metrics(50, TRAIN)
    log.summary("the last words")
    log.close()
    out, err = capsys.readouterr()
    assert out.endswith("the last words\n")
    is_in_stdout = "step  50/100" in out
    assert is_in_stdout == (not stdout_is_a_terminal)
    assert "10/100" in err
    first_figures = shown[0][:3]
    assert first_figures == ["loss 1.250", "1000 img/s", "top1 50.0 %"]


def test_silent_off_the_main_process(tmp_path, capsys):
    folder = tmp_path / "none"
    offline = LogConfig(wandb="offline")
    log = started(folder, config=offline, is_main=False)
    log.progress(1)
    log.metrics(1, TRAIN)
    log.say("a")
    log.warn("b")
    log.close(1)
    assert log.locations() == {}
    assert capsys.readouterr() == ("", "")
    assert not folder.exists()


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
    assert steps(tmp_path) == [1]
