"""All settings of a run, with default, rule and meaning: a tree of frozen dataclasses.

Command line, YAML file, checkpoint and Python code all build this tree, and `Config` checks it
whenever it is built. The sections are in
`config_sections`, with the rule about each value beside its field; the rules that involve
several keys are the small functions at the end. Rules that depend on the data or on the number of
ranks are checked where these are known (run.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from resnet_dist.addresses import is_url, without_secrets
from resnet_dist.settings.rules import NotEmpty, SettingError, check_values
from resnet_dist.settings.sections import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DistributedConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RecipeConfig,
    ScheduleConfig,
    TrainConfig,
    expand_paths,
)

__all__ = [
    "Config",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "DistributedConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "RecipeConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check_config",
    "to_dict",
]


@dataclass(frozen=True)
class Config:
    """Train an image classification network, with one process per device."""

    output_dir: Annotated[str, NotEmpty("it is the folder of the run")] = "runs/default"
    """folder of the run: checkpoints, config.yaml, metrics.jsonl, W&B files. The same command
    again resumes from it"""
    seed: int = 0
    """seed of everything random: initial weights, order of the images, crops, flips"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        expand_paths(self, "output_dir")
        if isinstance(self.output_dir, str) and is_url(self.output_dir):
            rule = "checkpoints and logs are written to a folder; copy it to a store afterwards"
            raise SettingError("output_dir", without_secrets(self.output_dir), rule)
        check_config(self)
        _resolve_mix_block(self)

    @classmethod
    def from_yaml(cls, *files: str | Path, changes: Mapping[str, Any] | None = None) -> "Config":
        """Read the settings of YAML files; those of later files override earlier ones.

        Args:
            files: YAML files, or recipes by name ("quickstart", "resnet50").
            changes: Settings that override the files, as {"train.epochs": 2}.

        Raises:
            ValueError: A file or a setting does not exist, or a value breaks a rule.
        """
        # By name: that module imports this one.
        settings = import_module("resnet_dist.settings.reading")
        config: Config = settings.config_from_files([str(name) for name in files], changes or {})
        return config


def _resolve_mix_block(config: Config) -> None:
    """Replace `augment.mix_block` null by the images per GPU of the recipe.

    A checkpoint then holds the number, whatever becomes of the facts of the recipe later.
    """
    augment = config.augment
    recipe = config.recipe
    if augment.mix_block is not None:
        return
    block = recipe.local_batch_size
    if not block and recipe.world_size:
        block = recipe.global_batch_size // recipe.world_size
    if not block and not augment.mixup_alpha and not augment.cutmix_alpha:
        return
    if not block:
        raise SettingError(
            "augment.mix_block",
            None,
            "recipe.global_batch_size and recipe.world_size, which it is computed from, are not "
            "both known: set a number of images, or 0 for the whole global batch",
        )
    # The dataclass is frozen once it is built.
    object.__setattr__(config, "augment", dataclasses.replace(augment, mix_block=block))
    check_config(config)


def check_config(config: Config) -> None:
    """Check types, values, and rules that involve several keys.

    Raises ValueError with the key, its value, the rule and the way out. `Config` calls it whenever
    one is built, whether from the command line, a YAML file, a checkpoint or in Python.
    """
    check_values(config)
    for rule in _RULES_ACROSS_KEYS:
        for key, value, text in rule(config):
            raise SettingError(key, value, text)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists and plain values, for YAML, JSON and checkpoints."""
    nested = dataclasses.asdict(config)
    plain = _without_tuples(nested)
    assert isinstance(plain, dict)
    return plain


def _without_tuples(value: object) -> object:
    """A copy of nested dicts and sequences in which every sequence is a list."""
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            plain[key] = _without_tuples(item)
        return plain
    if isinstance(value, (list, tuple)):
        return [_without_tuples(item) for item in value]
    return value


# Each function yields (key, value, rule) for what is wrong.
_Wrong = Iterator[tuple[str, object, str]]


def _nesterov(config: Config) -> _Wrong:
    optim = config.optim
    if optim.nesterov and not optim.momentum:
        yield "optim.nesterov", True, "it needs optim.momentum above 0"


def _warmup(config: Config) -> _Wrong:
    warmup = config.schedule.warmup_epochs
    epochs = config.train.epochs
    if warmup and warmup >= epochs:
        yield "schedule.warmup_epochs", warmup, f"it must be below train.epochs, {epochs}"


def _milestones(config: Config) -> _Wrong:
    schedule = config.schedule
    if schedule.kind != "step":
        return
    milestones = schedule.milestones
    warmup = schedule.warmup_epochs
    rising = sorted(set(milestones))
    if list(milestones) != rising:
        yield "schedule.milestones", milestones, "each must be above the one before it: they rise"
    if any(milestone <= warmup for milestone in milestones):
        yield (
            "schedule.milestones",
            milestones,
            f"each must be above schedule.warmup_epochs, {warmup}",
        )


def _scale_jitter(config: Config) -> _Wrong:
    if config.data.train_crop != "scale_jitter":
        return
    jitter = config.data.scale_jitter
    crop = config.data.train_crop_size
    if jitter[0] < crop:
        yield (
            "data.scale_jitter",
            jitter,
            f"its smallest size must be at least data.train_crop_size, {crop}",
        )


def _progressive_size(config: Config) -> _Wrong:
    start = config.data.progressive_start_size
    crop = config.data.train_crop_size
    if start > crop:
        yield (
            "data.progressive_start_size",
            start,
            f"it must be at most data.train_crop_size, {crop}",
        )
    epochs = config.data.progressive_epochs
    if start and not epochs[1]:
        yield (
            "data.progressive_epochs",
            epochs,
            "set the first and last epoch of the growth, for instance [0, 60]",
        )


def _compile_mode(config: Config) -> _Wrong:
    train = config.train
    if train.compile_mode == "reduce-overhead" and train.grad_accum_steps > 1:
        yield (
            "train.compile_mode",
            train.compile_mode,
            f"it needs train.grad_accum_steps 1, not {train.grad_accum_steps}: a second micro-step "
            "would overwrite the gradient of the first in the memory of the CUDA graph; take "
            "default",
        )


def _val_scales(config: Config) -> _Wrong:
    data = config.data
    if data.val_scales and data.val_crops == "ten":
        yield (
            "data.val_scales",
            data.val_scales,
            "it uses center squares: set data.val_crops center, and data.val_flip if you like",
        )


def _val_crop(config: Config) -> _Wrong:
    resize = config.data.val_resize_size
    crop = config.data.val_crop_size
    if resize < crop:
        yield (
            "data.val_resize_size",
            resize,
            f"it must be at least data.val_crop_size, {crop}, so that the image holds the crop",
        )


def _hue(config: Config) -> _Wrong:
    jitter = config.augment.color_jitter
    hue = jitter[3]
    if hue > 0.5:
        yield "augment.color_jitter", jitter, "its last number, the hue, must be at most 0.5"


def _mix_block(config: Config) -> _Wrong:
    augment = config.augment
    block = augment.mix_block
    if not block:
        return
    if block % 2:
        yield "augment.mix_block", block, "it must be even, since images are mixed in pairs"
    num_different = config.train.global_batch_size // augment.repeats
    if augment.repeats > 1 and num_different % 2:
        yield (
            "augment.mix_block",
            block,
            "with augment.repeats above 1, train.global_batch_size / augment.repeats must be even, "
            f"but it is {num_different}: change one of them, or set augment.mix_block to 0",
        )


def _magnitude(config: Config) -> _Wrong:
    augment = config.augment
    is_increasing = augment.policy == "randaugment_increasing"
    if is_increasing and augment.magnitude > 10:
        yield (
            "augment.magnitude",
            augment.magnitude,
            "it must be at most 10 for augment.policy randaugment_increasing, as in timm",
        )
    if augment.magnitude_std and not is_increasing:
        yield (
            "augment.magnitude_std",
            augment.magnitude_std,
            "only augment.policy randaugment_increasing varies the magnitude: set it to 0",
        )


_RULES_ACROSS_KEYS = (
    _nesterov,
    _warmup,
    _milestones,
    _scale_jitter,
    _progressive_size,
    _compile_mode,
    _val_scales,
    _val_crop,
    _hue,
    _mix_block,
    _magnitude,
)
