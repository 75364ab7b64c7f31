"""The targets of the Makefile for one GPU, for two steps on the CPU and on made-up data."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from data_files import tar_bytes, write_tree
from dist_utils import logged_lines, run_command
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
    make = ["make", "--no-print-directory", "-n", target, "PYTHON=python3", f"DATA={data}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    # A command may go on in the next line.
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def arguments_of(words):
    """What the command line of this package gets."""
    if "train.py" in words:
        program = words.index("train.py")
        return ["train", *words[program + 1 :]]
    program = words.index("resnet_dist.cli")
    return words[program + 1 :]


def with_options(arguments, options):
    """The arguments, and `--name value` for each option."""
    arguments = list(arguments)
    for name, value in options.items():
        arguments += [name, value]
    return arguments


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
    class_folders = folder / importing[-1]
    [again] = commands_of(target, class_folders)
    assert again[-1] == str(class_folders)
    assert again[:-1] == training[:-1]

    arguments = with_options(arguments_of(training), TWO_STEPS | more)
    code, printed = run_command(folder, arguments)
    assert code == 0, printed
    assert "training cache: " in printed
    [metrics] = folder.glob("runs/gpu_*/metrics.jsonl")
    return logged_lines(metrics.parent)[-1]


@pytest.mark.slow
def test_cifar10(folder):
    archive = folder / "cifar.tar.gz"
    archive.write_bytes(tar_bytes(cifar_binary(), "w:gz"))
    more = {"--train.global_batch_size": "5"}
    last_entry = run_training(folder, "gpu-cifar10", archive, more)
    assert last_entry["step"] == 2


@pytest.mark.slow
def test_tiny_imagenet(folder):
    archive = write_tiny_zip(folder / "tiny.zip", TINY)
    more = {
        "--train.global_batch_size": "3",
        "--data.val_resize_size": "32",
        "--data.val_crop_size": "32",
    }
    last_entry = run_training(folder, "gpu-tiny-imagenet", archive, more)
    assert last_entry["step"] == 2

    # An unpacked one has a folder train/ as well, but is not ready: it is imported first.
    unpacked = write_tree(folder / "unpacked", TINY)
    commands = commands_of("gpu-tiny-imagenet", unpacked)
    assert len(commands) == 2


@pytest.mark.slow
def test_throughput(folder):
    [words] = commands_of("gpu-throughput", "")
    arguments = with_options(arguments_of(words), SMALL_TABLE)
    (folder / "runs").mkdir()
    code, printed = run_command(folder, arguments)
    assert code == 0, printed
    table = json.loads(Path("runs/gpu_throughput.json").read_text())
    [row] = table["rows"]
    assert row["images_per_second"] > 0


@pytest.mark.parametrize("target", ["gpu-cifar10", "gpu-tiny-imagenet"])
def test_without_data_make_says_what_is_missing(target):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        commands_of(target, "")
    assert "DATA names no data" in failure.value.stderr


class Source(NamedTuple):
    """What the source of a recipe says."""

    recipe: str
    num_images: int
    updates: int
    lr_of_update: dict[int, float]


SOURCES = (
    Source(
        "cifar10_resnet20",
        num_images=50_000,
        updates=64_000,
        lr_of_update={
            0: 0.1,
            31_999: 0.1,
            32_000: 0.01,
            48_000: 0.001,
            63_999: 0.001,
        },
    ),
    Source(
        "tiny_imagenet_resnet18",
        num_images=100_000,
        updates=19_500,
        lr_of_update={
            975: 0.2,
            19_499: 0.0,
        },
    ),
)


def test_the_schedules_are_those_of_the_sources():
    """Learning rates by update, and the number of updates."""
    for source in SOURCES:
        path = ROOT / "configs" / "gpu" / f"{source.recipe}.yaml"
        config = cli.parse_config(["--config", str(path)])
        batch_size = config.train.global_batch_size
        per_epoch = steps_per_epoch(source.num_images, batch_size)
        total = epochs_to_steps(config.train.epochs, per_epoch)
        assert total == source.updates
        assert total == config.recipe.updates

        optim = config.optim
        peak = peak_lr(optim.base_lr, optim.base_batch_size, batch_size)
        schedule = build_schedule(config.schedule, peak, per_epoch, total)
        found = {step: schedule.lr(step) for step in source.lr_of_update}
        assert found == pytest.approx(source.lr_of_update, abs=1e-6), source.recipe
