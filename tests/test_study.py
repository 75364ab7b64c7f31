"""Studies: what is missing is run, what was interrupted is resumed, and the table is right."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dist_utils import run_app

from resnet_dist import cli
from resnet_dist.commands import study_forecast, study_trials
from resnet_dist.launch import status
from resnet_dist.models.build import MODELS
from resnet_dist.studies.results import read_study_results
from resnet_dist.studies.study_file import read_study

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "configs" / "studies"
STUDY = """
title: Zero-init
question: Does it help on digits?
config: quickstart
output_dir: {folder}/runs
seeds: [0, 1]
settings:
  data.train_crop_size: 8
  data.val_resize_size: 8
  data.val_crop_size: 8
  train.epochs: 0.5
  train.global_batch_size: 120
  train.eval_interval_epochs: 0
  schedule.warmup_epochs: 0
  optim.weight_decay: 1e-4
  log.wandb: disabled
  log.interval_steps: 1
  distributed.threads: 1
runs:
  plain:
  zero init: {{model.zero_init_residual: true}}
compare: [[plain, zero init]]
targets: [1, 50, 100]
"""


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "zero_init.yaml"
    path.write_text(STUDY.format(folder=tmp_path))
    return path


def run_study(*words):
    """The exit code of `resnet-dist study`."""
    return cli.main(["study", *(str(word) for word in words)])


def ended(command, code=0, output=""):
    """What subprocess.run returns for a command that has ended."""
    return subprocess.CompletedProcess(command, code, output, "")


def value_after(words, option):
    """The value of the last such option in a command."""
    values = [value for name, value in itertools.pairwise(words) if name == option]
    return values[-1]


def write_lines(folder, lines):
    """Write the metrics.jsonl of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def write_metrics(folder, top1):
    """The lines of a training of half an epoch, whose second half a later session did."""
    lines = [
        {"step": 3, "time": 100.0, "elapsed": 10.0, "train/epoch": 0.25, "val/top1": 10.0},
        {"step": 6, "time": 220.0, "elapsed": 20.0, "train/epoch": 0.5, "train/loss": 1.0},
        {"step": 6, "time": 225.0, "elapsed": 25.0, "train/epoch": 0.5, "val/top1": top1},
    ]
    write_lines(folder, lines)


@pytest.fixture
def trained(monkeypatch):
    """Trainings write what they would log, at once; the list has the command of each.

    Zero-init adds three points to the accuracy.
    """
    commands = []

    def run(command, **details):
        if command[0] != sys.executable:
            # The study asks git for the commit, and Python's platform module for the processor.
            return ended(command, output="0123456789ab\n")
        words = command[3:]
        commands.append(words)
        seed = int(value_after(words, "--seed"))
        top1 = 50 + seed
        if "--model.zero_init_residual" in words:
            top1 += 3
        folder = Path(value_after(words, "--output_dir"))
        write_metrics(folder, top1)
        return ended(command)

    monkeypatch.setattr(study_trials.subprocess, "run", run)
    return commands


def test_what_is_missing_is_run_and_the_page_has_every_training(
    study_file, digits, tmp_path, trained, capsys, monkeypatch
):
    words = [study_file, "--set", f"data.data_dir={digits}"]
    collected = tmp_path / "docs" / "results"
    page = tmp_path / "docs" / "results.md"

    # A dry run says what is missing.
    assert run_study(*words, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert printed.count("missing, 0.5 epochs left") == 4
    assert "4 trainings of unknown speed" in printed
    assert "in all" not in printed
    assert trained == []

    assert run_study(*words, "--collect", collected) == 0
    table = capsys.readouterr().out
    assert len(trained) == 4
    # 50 and 51 %; Student's t with one degree of freedom is 12.71.
    assert "| plain | 2 | 50.50 % | 0.71 | 44.15 to 56.85 | 35 s |" in table
    # Ten seconds of the first session, and 25 of the second.
    assert "| 10 s | 35 s | 0 of 2 reached it |" in table
    assert "zero init against plain: +3.00 points, 95 % interval +3.00 to +3.00" in table

    # A finished study runs nothing; one that was cut short resumes.
    study = read_study(study_file, {"data.data_dir": digits})
    metrics = study.trials[0].folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]))
    trained.clear()
    assert run_study(*words) == 0
    assert [command[0] for command in trained] == ["train"]
    capsys.readouterr()

    # The page links to the files of every training.
    assert run_study(*words, "--collect", collected, "--page", page) == 0
    text = page.read_text()
    assert text.count("0123456789ab") == 4
    study_folder = collected / "zero_init"
    for training in ("plain_seed0", "zero_init_seed1"):
        assert f"results/zero_init/{training}/metrics.jsonl" in text
        assert (study_folder / training / "metrics.jsonl").exists()
    assert (study_folder / "curves.png").exists()
    origin = json.loads((study_folder / "plain_seed0/study.json").read_text())
    assert origin["command"][:3] == ["resnet-dist", "train", "--config"]

    # Without matplotlib there are no curves, and the error says what to install.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_study(*words, "--collect", collected, "--page", page) == 2
    assert "pip install 'resnet-dist[report]'" in capsys.readouterr().err


def test_times_by_the_cpu_clock(study_file):
    """Of two sessions, 7 and 9 s of CPU time; earlier versions did not log it."""
    with study_file.open("a") as file:
        file.write("clock: cpu\n")
    study = read_study(study_file)
    folder = study.trials[0].folder
    first_session = {
        "step": 3,
        "time": 100.0,
        "elapsed": 10.0,
        "elapsed_cpu": 7.0,
        "train/epoch": 0.25,
        "val/top1": 1.0,
    }
    second_session = {
        "step": 6,
        "time": 225.0,
        "elapsed": 25.0,
        "elapsed_cpu": 9.0,
        "train/epoch": 0.5,
        "val/top1": 50.0,
    }
    write_lines(folder, [first_session, second_session])
    [result] = read_study_results(study)["plain"]
    assert result.seconds == 16.0
    assert result.seconds_to_target == {1: 7.0, 50: 16.0}

    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("elapsed_cpu", "other"))
    with pytest.raises(ValueError, match=r"metrics.jsonl has no elapsed_cpu.* set clock: wall"):
        read_study_results(study)
    wrong_clock = study_file.read_text().replace("clock: cpu", "clock: gpu")
    study_file.write_text(wrong_clock)
    with pytest.raises(ValueError, match="clock is gpu: it must be wall, or cpu"):
        read_study(study_file)


def lines_of_a_measurement(epochs):
    """A line for each step; the first five steps take much longer than the later ones."""
    steps_per_epoch = 12
    num_steps = max(1, round(steps_per_epoch * epochs))
    lines = []
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "time": 100.0 * step,
                "elapsed": step,
                "train/epoch": step / steps_per_epoch,
                "train/step_seconds": 2.0 if step > 5 else 50.0,
            }
        )
    return lines


def test_the_time_that_is_missing_is_measured(study_file, monkeypatch, capsys):
    """A tenth of an epoch is one step: it is measured again with ten, of which the last five
    count. An epoch of 12 steps of 2 s takes 24 s.
    """
    commands = []

    def run(command, **details):
        words = command[3:]
        commands.append(words)
        epochs = float(value_after(words, "--train.epochs"))
        folder = Path(words[-1])
        write_lines(folder, lines_of_a_measurement(epochs))
        return ended(command)

    monkeypatch.setattr(study_forecast.subprocess, "run", run)
    assert run_study(study_file, "--dry_run", "--measure", "--ranks", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("missing, 0.5 epochs left, about 0.2 min") == 4
    assert "in all: about 0.8 min" in printed
    assert "unknown" not in printed
    # Each of the two runs is measured for all of its seeds.
    assert len(commands) == 4
    assert commands[0][0] == "launch"


def test_what_is_queued_is_not_submitted_again(study_file, monkeypatch, capsys):
    """The job of the first training waits, that of the second has ended."""
    commands = []

    def run(command, **details):
        commands.append(command[3:])
        return ended(command)

    states = {"7": "PENDING", "8": "COMPLETED"}
    monkeypatch.setattr(study_trials.subprocess, "run", run)
    monkeypatch.setattr(status, "show_job", lambda job_id: {"JobState": states[job_id]})
    first, second, *_ = read_study(study_file).trials
    for trial, job_id in ((first, "7"), (second, "8")):
        folder = trial.folder / "job_1"
        folder.mkdir(parents=True)
        (folder / f"{job_id}_submitted.pkl").touch()

    assert run_study(study_file, "--submit", "cluster.yaml") == 0
    assert "plain, seed 0: job 7 has not ended" in capsys.readouterr().out
    assert len(commands) == 3
    for words in commands:
        assert words[:3] == ["submit", "--config", "cluster.yaml"]


@pytest.mark.slow
def test_a_real_training(study_file, digits, tmp_path, monkeypatch):
    """Of a study with one run and one seed."""

    def run(command, **details):
        code = 0
        if command[0] == sys.executable:
            [code] = run_app(1, command[3:], str(tmp_path / "log"))
        return ended(command, code)

    monkeypatch.setattr(study_trials.subprocess, "run", run)
    text = study_file.read_text()
    for old, new in (
        ("seeds: [0, 1]", "seeds: [3]"),
        ("  zero init: {model.zero_init_residual: true}\n", ""),
        ("compare: [[plain, zero init]]", ""),
    ):
        text = text.replace(old, new)
    study_file.write_text(text)
    assert run_study(study_file, "--set", f"data.data_dir={digits}") == 0
    study = read_study(study_file)
    [result] = read_study_results(study)["plain"]
    assert 0 < result.accuracy < 100
    # The accuracy reaches the first target, and perhaps the second.
    reached = list(result.seconds_to_target)
    assert reached in ([1], [1, 50])


def test_a_failed_training_does_not_stop_the_others(study_file, monkeypatch, capsys):
    def fail(command, **details):
        return ended(command, code=2)

    monkeypatch.setattr(study_trials.subprocess, "run", fail)
    assert run_study(study_file) == 1
    printed = capsys.readouterr().out
    assert printed.count("exit code 2") == 4
    assert "| plain | 0 of 2 | not run |" in printed


INTERRUPTED_TRAINING = """
import os, signal, time

def save_and_end(*_):
    time.sleep(1)
    os._exit(130)

signal.signal(signal.SIGINT, save_and_end)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupted_training_saves_and_ends_the_study(study_file, monkeypatch):
    """Ctrl-C reaches the study and the training: the study must not kill what saves."""

    def interrupt_both(command, **details):
        os.kill(os.getpid(), signal.SIGINT)
        return real_run([sys.executable, "-c", INTERRUPTED_TRAINING], **details)

    real_run = subprocess.run
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(study_trials, "_write_origin", lambda *parts: None)
    monkeypatch.setattr(study_trials.subprocess, "run", interrupt_both)
    assert run_study(study_file) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_mistakes_name_file_and_key(study_file, tmp_path, capsys):
    text = study_file.read_text()
    for old, new, words in (
        ("title: Zero-init", "", "the key title is missing"),
        ("seeds: [0, 1]", "seeds: [a]", "seeds holds 'a'"),
        ("seeds: [0, 1]", "seeds: []", "seeds is empty"),
        ("seeds: [0, 1]", "seeds: [0.5]", "seeds holds 0.5: it must be a whole number"),
        ("seeds: [0, 1]", "seeds: [1, 0, 1]", "seeds holds 1 twice"),
        ("seeds: [0, 1]", "seeds: [0]\nseeds: [1]", "seeds is there twice"),
        ("compare: [[plain, zero init]]", "compare: [[plain, zero ini]]", "mean zero init?"),
        ("question:", "queston: x\nquestion:", "did you mean question?"),
        ("{model.zero_init_residual: true}", "{model.zero_init: true}", "model.zero_init_residual"),
        ("  train.epochs: 0.5", "  train.epochs: -1", "train.epochs is -1"),
        ("config: quickstart", "config: quickstrt", "quickstart"),
        ("runs:", "runs: [", "cannot read the study"),
    ):
        assert old in text
        study_file.write_text(text.replace(old, new))
        assert run_study(study_file) == 2
        error = capsys.readouterr().err
        assert str(study_file) in error, error
        assert words in error, error

    # What is wrong with the arguments.
    assert run_study(tmp_path / "none.yaml") == 2
    study_file.write_text(text)
    assert run_study(study_file, "--set", "train.epochs") == 2
    capsys.readouterr()
    assert run_study(study_file, "--set", "train.epochs=[") == 2
    assert "--set train.epochs=[ is not valid YAML" in capsys.readouterr().err
    assert run_study(study_file, "--page", "x.md") == 2


@pytest.mark.slow
def test_the_studies_of_the_project_are_right():
    files = sorted(STUDIES.glob("*.yaml"))
    assert len(files) >= 10
    for path in files:
        study = read_study(path)
        assert study.compare or study.targets, path
        is_of_digits = path.name.startswith("digits_")
        # The images of CIFAR-10 were JPEG files, whose figures compare with no published ones.
        if not is_of_digits:
            assert "JPEG files of quality 75 with halved chroma" in study.notes, path
        for training in study.trials:
            assert training.config.model.name in MODELS, path


@pytest.mark.slow
def test_the_page_of_results_is_written_by_the_studies(tmp_path):
    """The figures of docs/results.md are those of the files below docs/results."""
    docs = ROOT / "docs"
    collected = tmp_path / "results"
    page = tmp_path / "results.md"
    shutil.copytree(docs / "results", collected)
    files = sorted(STUDIES.glob("*.yaml"))
    assert run_study(*files, "--collect", collected, "--page", page) == 0
    expected = (docs / "results.md").read_text()
    assert page.read_text() == expected
