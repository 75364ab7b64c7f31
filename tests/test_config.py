"""The command line: what it accepts, what it refuses, how fast it answers."""

import os
import subprocess
import sys
from dataclasses import is_dataclass

import pytest
import yaml
from dist_utils import options

from resnet_dist.cli import parse_config
from resnet_dist.config import Config, DataConfig, OptimConfig, TrainConfig, to_dict
from resnet_dist.settings.options import field_meanings
from resnet_dist.settings.reading import setting_hints
from resnet_dist.settings.remarks import recipe_mismatch, remarks


def parse(*arguments):
    """The config of a command line."""
    return parse_config(list(arguments))


def refusal(capsys, *arguments):
    """What is printed about a command line that is refused."""
    with pytest.raises(SystemExit) as ending:
        parse(*arguments)
    assert ending.value.code == 2
    return capsys.readouterr().err


def test_files_overlay_each_other_and_the_command_line_wins(tmp_path):
    first = tmp_path / "a.yaml"
    second = tmp_path / "b.yaml"
    first.write_text("optim: {base_lr: 1e-4, momentum: 0.5}\nschedule: {milestones: [8, 9.5]}\n")
    second.write_text("optim: {momentum: 0.8}\n")
    config = parse(
        *("--config", str(first)),
        *("--config", str(second)),
        *("--seed", "5"),
    )
    # Plain PyYAML reads 1e-4 as a string.
    assert config.optim.base_lr == 1e-4
    assert config.optim.momentum == 0.8
    assert config.schedule.milestones == (8.0, 9.5)
    assert config.seed == 5
    assert config.train == Config().train


@pytest.mark.slow
def test_the_resolved_config_reads_back(tmp_path):
    config = parse(
        *("--data.data_dir", "/data"),
        *("--model.num_classes", "7"),
        *("--optim.norm_weight_decay", "0"),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert parse("--config", str(path)) == config


@pytest.mark.slow
def test_unknown_keys_and_wrong_types_are_refused_by_name(capsys, tmp_path):
    assert "--model.nmae" in refusal(capsys, "--model.nmae", "resnet18")
    assert "optim.base_lr" in refusal(capsys, "--optim.base_lr", "fast")
    assert "train.precision" in refusal(capsys, "--train.precision", "fp8")

    path = tmp_path / "a.yaml"
    path.write_text("optim: {learning_rate: 0.1}\n")
    assert "learning_rate" in refusal(capsys, "--config", str(path))
    path.write_text("train: {epochs: many}\n")
    assert "train.epochs" in refusal(capsys, "--config", str(path))
    missing = tmp_path / "nowhere.yaml"
    assert "nowhere.yaml" in refusal(capsys, "--config", str(missing))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.epochs", "0"], ["train.epochs", "0"]),
        (["--schedule.warmup_epochs", "90"], ["schedule.warmup_epochs", "90"]),
        (["--schedule.warmup_start_factor", "0"], ["schedule.warmup_start_factor"]),
        (
            ["--schedule.kind", "step", "--schedule.milestones", "[60, 30]"],
            ["schedule.milestones", "rise"],
        ),
        (
            ["--schedule.kind", "step", "--schedule.milestones", "[3, 30]"],
            ["schedule.milestones", "warmup_epochs"],
        ),
        (["--data.val_resize_size", "200"], ["data.val_resize_size", "val_crop_size"]),
        (["--data.crop_scale", "[1.0, 0.5]"], ["data.crop_scale"]),
        (["--optim.momentum", "0", "--optim.nesterov", "true"], ["optim.nesterov", "momentum"]),
        (["--train.ema_decay", "1"], ["train.ema_decay"]),
        (["--optim.backbone_lr_scale", "0"], ["optim.backbone_lr_scale", "unfreeze_from"]),
        (["--checkpoint.keep", "0"], ["checkpoint.keep"]),
        (["--data.std", "[0, 1, 1]"], ["data.std"]),
        (["--data.threads", "-1"], ["data.threads"]),
        (["--data.crop_scale", "[0.1, 1.5]"], ["data.crop_scale"]),
        (["--optim.weight_decay", "-1"], ["optim.weight_decay"]),
        (["--schedule.gamma", "0"], ["schedule.gamma"]),
        (["--optim.betas", "[0.9, 1.0]"], ["optim.betas"]),
        (["--optim.eps", "-1"], ["optim.eps"]),
        (["--optim.trust_coefficient", "0"], ["optim.trust_coefficient"]),
        (["--schedule.decay_epochs", "0"], ["schedule.decay_epochs"]),
        (["--train.bce_target_threshold", "1"], ["train.bce_target_threshold"]),
    ],
)
def test_rules_across_keys(capsys, arguments, words):
    message = refusal(capsys, *arguments)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"train": TrainConfig(precision="fp8")},
            ["train.precision", "'fp8'", "one of auto, fp32"],
        ),
        ({"train": TrainConfig(epochs="90")}, ["train.epochs", "'90'", "a number"]),
        ({"train": TrainConfig(epochs=float("inf"))}, ["train.epochs", "finite"]),
        ({"train": TrainConfig(epochs=float("nan"))}, ["train.epochs", "finite"]),
        ({"train": TrainConfig(grad_accum_steps=True)}, ["grad_accum_steps", "a whole number"]),
        ({"data": DataConfig(crop_scale=(0.1,))}, ["data.crop_scale", "a list of 2 numbers"]),
        ({"optim": OptimConfig(eps="small")}, ["optim.eps", "a number or null"]),
        ({"output_dir": " "}, ["output_dir", "not be empty"]),
        ({"seed": 1.5}, ["seed", "a whole number"]),
    ],
)
def test_a_config_built_in_python_is_checked(section, words):
    with pytest.raises(ValueError) as error:
        Config(**section)
    message = str(error.value)
    for word in words:
        assert word in message, message

    # A list is as good as a tuple.
    config = Config(data=DataConfig(val_scales=[224]))
    assert config.data.val_scales == [224]


def test_defaults_are_valid_and_without_remarks():
    assert remarks(Config(), "cuda") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--schedule.kind", "step", "--schedule.final_lr", "0.1"], "final_lr"),
        (["--schedule.kind", "step", "--schedule.milestones", "[30, 100]"], "reach beyond"),
        (["--schedule.milestones", "[7]"], "cosine"),
        (["--schedule.power", "3"], "power"),
        (["--schedule.kind", "polynomial", "--schedule.decay_epochs", "2"], "decay_epochs is 2.0"),
        (["--schedule.kind", "exponential", "--schedule.final_lr", "0.1"], "final_lr"),
        (
            ["--optim.kind", "lamb", "--optim.momentum", "0.8"],
            "optim.momentum is 0.8, which optim.kind lamb does not use",
        ),
        (["--optim.kind", "lars", "--optim.nesterov", "true"], "optim.nesterov"),
        (["--optim.betas", "[0.8, 0.9]"], "optim.betas"),
        (["--optim.kind", "rmsprop", "--optim.trust_coefficient", "1"], "trust_coefficient"),
        (["--train.bce_target_threshold", "0.2"], "bce_target_threshold"),
        (
            options(train__loss="bce", train__bce_target_threshold=0.2, train__label_smoothing=0.1),
            "smoothing",
        ),
        (["--checkpoint.resume", "a", "--checkpoint.init_from", "b"], "init_from"),
        (["--train.distillation_temperature", "2"], "train.teacher is empty"),
        (options(train__teacher="t", train__label_smoothing=0.1), "distillation_weight is 1"),
        (["--optim.unfreeze_from", "head"], "random weights"),
        (["--optim.backbone_lr_scale", "0.1"], "random weights"),
        (
            options(
                optim__unfreeze_from="head", optim__backbone_lr_scale=0.1, checkpoint__init_from="a"
            ),
            "no effect",
        ),
        (["--schedule.warmup_epochs", "0", "--schedule.warmup_kind", "constant"], "warmup_kind"),
        (["--data.kind", "synthetic", "--data.data_dir", "x"], "data_dir"),
        (["--train.precision", "fp16"], "fp16"),
        (["--train.compile_mode", "reduce-overhead"], "compile_mode"),
    ],
)
def test_settings_without_effect_are_remarked(arguments, word):
    found = remarks(parse(*arguments), "cpu")
    assert len(found) == 1
    assert word in found[0]


def test_bf16_without_hardware_is_obeyed_with_a_warning():
    config = Config(train=TrainConfig(precision="bf16"))
    [on_cpu] = remarks(config, "cpu", has_fast_bf16=False)
    assert "about nine times slower than fp32, measured on an AVX2 CPU" in on_cpu
    assert "use train.precision auto or fp32" in on_cpu
    [on_gpu] = remarks(config, "cuda", has_fast_bf16=False)
    assert "auto or fp16" in on_gpu
    assert remarks(config, "cpu", has_fast_bf16=True) == []
    assert remarks(Config(), "cpu", has_fast_bf16=False) == []


@pytest.mark.parametrize(
    ("arguments", "world_size", "words"),
    [
        ([], 1, []),
        (["--recipe.global_batch_size", "1024", "--recipe.world_size", "4"], 1, []),
        (["--recipe.global_batch_size", "1025"], 1, ["train.global_batch_size is 256", "1025"]),
        (["--recipe.global_batch_size", "32"], 1, ["train.global_batch_size is 256", "32"]),
        (["--recipe.world_size", "8"], 1, ["1 ranks, the recipe 8"]),
        (["--recipe.world_size", "1"], 8, ["8 ranks, the recipe 1"]),
        (
            ["--recipe.world_size", "8", "--model.sync_batch_norm", "false"],
            1,
            ["over 256 images", "32", "more ranks"],
        ),
        (
            ["--recipe.world_size", "1", "--model.sync_batch_norm", "false"],
            8,
            ["over 32 images", "256", "sync_batch_norm"],
        ),
        (
            options(
                recipe__world_size=8,
                model__sync_batch_norm="false",
                train__grad_accum_steps=8,
            ),
            1,
            ["time"],
        ),
    ],
)
def test_a_run_far_from_its_recipe_says_so(arguments, world_size, words):
    found = recipe_mismatch(parse(*arguments), world_size)
    num_sentences = 1 if words else 0
    assert len(found) == num_sentences
    for word in words:
        assert word in found[0], found


def test_help_is_quick_and_complete():
    """Every option with its default and a line of meaning, before torch is imported."""
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        capture_output=True,
        env=environment,
        check=True,
        text=True,
    )
    # A line of -X importtime ends with the name of a module.
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "yaml" in imported
    for heavy in ("torch", "numpy", "nvidia.dali", "wandb", "torchvision"):
        assert heavy not in imported

    help_text = " ".join(done.stdout.split())
    assert len(setting_hints()) > 50
    for key in setting_hints():
        assert f"--{key} " in help_text
    sections = [type(value) for value in vars(Config()).values() if is_dataclass(value)]
    for section in (Config, *sections):
        for key, meaning in field_meanings(section).items():
            name = f"{section.__name__}.{key}"
            assert len(meaning) > 10, f"{name} has no meaning"
            assert meaning in help_text, f"{name} has no meaning"


@pytest.mark.slow
def test_print_config_prints_the_tree():
    done = subprocess.run(
        [sys.executable, "train.py", "--optim.base_lr", "0.2", "--print_config"],
        capture_output=True,
        text=True,
        check=True,
    )
    tree = yaml.safe_load(done.stdout)
    assert tree["optim"]["base_lr"] == 0.2
    assert tree["model"]["name"] == "resnet50"
