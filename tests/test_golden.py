"""A run folder that commit 89aca0e wrote is still read: resumed, evaluated, predicted, reported.

`golden/run_89aca0e` is a run that was killed at its thirtieth of 48 steps:

    train.py --config configs/quickstart.yaml --model.name lenet5 --train.precision fp32
        --train.epochs 2 --train.global_batch_size 60 --optim.base_lr 1.5
        --schedule.warmup_epochs 0.5 --train.eval_interval_epochs 1.25
        --checkpoint.interval_steps 15 --checkpoint.interval_epochs 0 --checkpoint.keep 1
        --log.interval_steps 1 --log.wandb disabled --distributed.threads 1 --data.threads 1

`golden/run_89aca0e_expected.jsonl` is what the same run logged when nobody killed it.
"""

import json
import shutil
from pathlib import Path

import pytest
from dist_utils import run_command

from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "run_89aca0e"
EXPECTED = GOLDEN.with_name("run_89aca0e_expected.jsonl")


@pytest.fixture
def folder(tmp_path):
    """A copy of the run folder, with its links."""
    copy = tmp_path / "run"
    shutil.copytree(GOLDEN, copy, symlinks=True)
    return copy


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_it_is_resumed_and_ends_as_it_would_have(folder, digits):
    """With its old config.yaml; losses and learning rates of every later step are the same."""
    command = [
        "train",
        "--config",
        folder / "config.yaml",
        "--data.data_dir",
        digits,
        "--output_dir",
        folder,
    ]
    code, printed = run_command(folder, command)
    assert code == 0, printed
    assert "step 30, from" in printed, printed
    assert "warning" not in printed, printed

    found = lines_of(folder / "metrics.jsonl")
    expected = lines_of(EXPECTED)
    for found_line, expected_line in zip(found, expected, strict=True):
        step = expected_line["step"]
        assert found_line["step"] == step
        for key, value in expected_line.items():
            assert found_line[key] == pytest.approx(value, rel=1e-3, abs=1e-3), (step, key)

    path = folder / "checkpoints" / "last.pt"
    payload = read_checkpoint(path, pytest.fail)
    content = unpack_checkpoint(payload, "last.pt")
    assert content["step"] == 48


def names_below(folder):
    """The sorted names of everything below a folder."""
    return sorted(path.name for path in folder.rglob("*"))


def logged_evaluation(step):
    """The line of the expected metrics that has the evaluation of this step."""
    found = []
    for line in lines_of(EXPECTED):
        if line["step"] == step and "val/loss" in line:
            found.append(line)
    [evaluation] = found
    return evaluation


@pytest.mark.slow
def test_it_is_evaluated_predicted_and_reported(folder, digits):
    """By its folder; the evaluation is the one that it logged."""

    def command(*words):
        code, printed = run_command(folder.parent, words)
        assert code == 0, printed
        return printed

    files_before = names_below(folder)
    settings = (
        "--data.data_dir",
        digits,
        "--data.threads",
        "1",
        "--distributed.threads",
        "1",
    )

    printed = command("evaluate", "--checkpoint", folder, "--json", *settings)
    last_line = printed.splitlines()[-1]
    result = json.loads(last_line)
    logged = logged_evaluation(step=30)
    assert result["step"] == 30
    assert result["model"]["loss"] == pytest.approx(logged["val/loss"], rel=1e-3)
    assert result["model"]["top1"] == pytest.approx(logged["val/top1"], abs=0.3)

    image = f"{digits}/val/3/0004.jpg"
    printed = command("predict", image, "--checkpoint", folder, *settings)
    assert "lenet5, model weights of step 30" in printed
    assert names_below(folder) == files_before, "a command has written there"

    printed = command("report", folder, "--out", folder / "metrics.png")
    assert "30 steps" in printed
