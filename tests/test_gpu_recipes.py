"""The targets of the Makefile for one GPU, for two steps on the CPU and on made-up data."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from data_files import tar_bytes, write_tree
from dist_utils import run_app
from published_sets import TINY, cifar_binary, write_tiny_zip

from resnet_dist import cli
from resnet_dist.data.sampling.order import steps_per_epoch
from resnet_dist.schedule import build_schedule, epochs_to_steps, peak_lr

ROOT = Path(__file__).resolve().parents[1]
TWO_STEPS = {
    "--train.epochs": "1",
    "--train.eval_interval_epochs": "0",
    "--schedule.warmup_epochs": "0",
    "--log.interval_steps": "1",
    "--log.wandb": "disabled",
    "--distributed.threads": "1",
}
SMALL_TABLE = {
    "--models": "resnet20",
    "--precisions": "fp32",
    "--steps": "1",
    "--windows": "1",
    "--data.train_crop_size": "32",
    "--train.global_batch_size": "2",
    "--log.wandb": "disabled",
}


def commands_of(target, data):
    """The commands that make would run, as lists of words."""
    line = ["make", "--no-print-directory", "-n", target, "PYTHON=python3", f"DATA={data}"]
    printed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [shlex.split(text) for text in printed.replace("\\\n", " ").splitlines()]


def arguments_of(words):
    """What the command line of this package gets."""
    if "train.py" in words:
        return ["train", *words[words.index("train.py") + 1 :]]
    return words[words.index("resnet_dist.cli") + 1 :]


def with_options(arguments, options):
    return arguments + [text for pair in options.items() for text in pair]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run: what they write is beside a copy of the recipes."""
    shutil.copytree(ROOT / "configs" / "gpu", tmp_path / "configs" / "gpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_training(folder, target, data, more):
    """Import and train for two steps. Returns the last entry of metrics.jsonl."""
    importing, training = commands_of(target, data)
    assert cli.main(arguments_of(importing)) == 0
    # Class folders are not imported again.
    [again] = commands_of(target, folder / importing[-1])
    assert again[-1] == str(folder / importing[-1])
    assert again[:-1] == training[:-1]
    arguments = with_options(arguments_of(training), TWO_STEPS | more)
    assert run_app(1, arguments, "printed") == [0], Path("printed").read_text()
    assert "training cache: " in Path("printed").read_text()
    [metrics] = folder.glob("runs/gpu_*/metrics.jsonl")
    return json.loads(metrics.read_text().splitlines()[-1])


@pytest.mark.slow
def test_cifar10(folder):
    (folder / "cifar.tar.gz").write_bytes(tar_bytes(cifar_binary(), "w:gz"))
    more = {"--train.global_batch_size": "5"}
    assert run_training(folder, "gpu-cifar10", folder / "cifar.tar.gz", more)["step"] == 2


@pytest.mark.slow
def test_tiny_imagenet(folder):
    archive = write_tiny_zip(folder / "tiny.zip", TINY)
    smaller = {"--data.val_resize_size": "32", "--data.val_crop_size": "32"}
    more = {"--train.global_batch_size": "3", **smaller}
    assert run_training(folder, "gpu-tiny-imagenet", archive, more)["step"] == 2
    # An unpacked one has a folder train/ as well, but is not ready.
    unpacked = write_tree(folder / "unpacked", TINY)
    assert len(commands_of("gpu-tiny-imagenet", unpacked)) == 2


@pytest.mark.slow
def test_throughput(folder):
    [words] = commands_of("gpu-throughput", "")
    arguments = with_options(arguments_of(words), SMALL_TABLE)
    (folder / "runs").mkdir()
    assert run_app(1, arguments, "printed") == [0], Path("printed").read_text()
    [row] = json.loads(Path("runs/gpu_throughput.json").read_text())["rows"]
    assert row["images_per_second"] > 0


@pytest.mark.parametrize("target", ["gpu-cifar10", "gpu-tiny-imagenet"])
def test_without_data_make_says_what_is_missing(target):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        commands_of(target, "")
    assert "DATA names no data" in failure.value.stderr


def test_the_schedules_are_those_of_the_sources():
    """Learning rates by update, and the number of updates."""
    expected = {
        "cifar10_resnet20": (
            50_000,
            64_000,
            {0: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001, 63_999: 0.001},
        ),
        "tiny_imagenet_resnet18": (100_000, 19_500, {975: 0.2, 19_499: 0.0}),
    }
    for name, (num_images, updates, rates) in expected.items():
        config = cli.parse_config(["--config", str(ROOT / "configs" / "gpu" / f"{name}.yaml")])
        train = config.train
        optim = config.optim
        per_epoch = steps_per_epoch(num_images, train.global_batch_size)
        total = epochs_to_steps(train.epochs, per_epoch)
        assert total == updates == config.recipe.updates
        peak = peak_lr(optim.base_lr, optim.base_batch_size, train.global_batch_size)
        schedule = build_schedule(config.schedule, peak, per_epoch, total)
        found = {step: schedule.lr(step) for step in rates}
        assert found == pytest.approx(rates, abs=1e-6), name
