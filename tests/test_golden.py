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
    return Path(shutil.copytree(GOLDEN, tmp_path / "run", symlinks=True))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_it_is_resumed_and_ends_as_it_would_have(folder, digits):
    """With its old config.yaml; losses and learning rates of every later step are the same."""
    words = ["train", "--config", folder / "config.yaml", "--data.data_dir", digits]
    code, printed = run_command(folder, [*words, "--output_dir", folder])
    assert code == 0, printed
    assert "step 30, from" in printed, printed
    assert "warning" not in printed, printed
    found = lines_of(folder / "metrics.jsonl")
    expected = lines_of(EXPECTED)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-3), (ours["step"], key)
    payload = read_checkpoint(folder / "checkpoints" / "last.pt", pytest.fail)
    assert unpack_checkpoint(payload, "last.pt")["step"] == 48


@pytest.mark.slow
def test_it_is_evaluated_predicted_and_reported(folder, digits):
    """By its folder; the evaluation is the one that it logged."""

    def command(*words):
        code, printed = run_command(folder.parent, words)
        assert code == 0, printed
        return printed

    before = sorted(path.name for path in folder.rglob("*"))
    settings = ("--data.data_dir", digits, "--data.threads", "1", "--distributed.threads", "1")
    result = command("evaluate", "--checkpoint", folder, "--json", *settings)
    [line] = [line for line in lines_of(EXPECTED) if line["step"] == 30 and "val/loss" in line]
    counts = json.loads(result.splitlines()[-1])
    assert counts["step"] == 30
    assert counts["model"]["loss"] == pytest.approx(line["val/loss"], rel=1e-3)
    assert counts["model"]["top1"] == pytest.approx(line["val/top1"], abs=0.3)
    image = f"{digits}/val/3/0004.jpg"
    printed = command("predict", image, "--checkpoint", folder, *settings)
    assert "lenet5, model weights of step 30" in printed
    assert sorted(path.name for path in folder.rglob("*")) == before, "a command has written there"
    assert "30 steps" in command("report", folder, "--out", folder / "metrics.png")
