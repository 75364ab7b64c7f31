"""Warnings at the start of a run: settings without effect, slow ones, or far from the recipe.

None of them is an error. Each function yields sentences that name the key and its value.
"""

from collections.abc import Iterator
from operator import attrgetter

from resnet_dist.config import Config

# For each kind of optimizer, schedule and loss, the settings of the same section that it uses.
_USED_SETTINGS = {
    "optim.kind": {
        "sgd": ("momentum", "nesterov"),
        "lars": ("momentum", "trust_coefficient", "eps"),
        "lamb": ("betas", "eps"),
        "rmsprop": ("momentum", "alpha", "eps"),
        "adamw": ("betas", "eps"),
    },
    "schedule.kind": {
        "cosine": ("final_lr",),
        "step": ("milestones", "gamma"),
        "polynomial": ("power", "final_lr"),
        "exponential": ("gamma", "decay_epochs"),
    },
    "train.loss": {"ce": (), "bce": ("bce_target_threshold",)},
}
_DEFAULTS = Config()


def remarks(config: Config, device: str, has_fast_bf16: bool = True) -> list[str]:
    """All warnings about the settings themselves.

    Args:
        config: the settings.
        device: "cuda" or "cpu".
        has_fast_bf16: whether the device has instructions for bf16.
    """
    found = [text for check in _CHECKS for text in check(config)]
    return [*found, *_device(config, device), *_bf16(config, device, has_fast_bf16)]


def recipe_mismatch(config: Config, world_size: int) -> list[str]:
    """Warnings about a run that differs from its recipe by more than a factor of 4.

    Compared are the global batch size, the number of ranks, and the number of images over which a
    batch norm layer computes its statistics.
    """
    recipe, batch_size = config.recipe, config.train.global_batch_size
    ranks = recipe.world_size or world_size
    found = []
    if _is_far(batch_size, recipe.global_batch_size):
        found.append(
            f"train.global_batch_size is {batch_size}, and the recipe's result was reached with "
            f"{recipe.global_batch_size}: expect another result, or use that batch size "
            "(train.grad_accum_steps saves memory)"
        )
    images = batch_size / world_size / config.train.grad_accum_steps
    recipe_images = (recipe.global_batch_size or batch_size) / ranks
    has_local_statistics = recipe.world_size and not config.model.sync_batch_norm
    if has_local_statistics and _is_far(images, recipe_images):
        way_out = "more ranks, or more train.grad_accum_steps"
        if images < recipe_images:
            way_out = "model.sync_batch_norm true, or fewer ranks and train.grad_accum_steps"
        found.append(
            f"batch norm statistics are over {images:g} images, on the recipe's {ranks} ranks over "
            f"{recipe_images:g}: use {way_out}"
        )
    elif _is_far(world_size, ranks):
        effect = "" if config.model.sync_batch_norm else ": only the time it takes should differ"
        found.append(f"this run has {world_size} ranks, the recipe {ranks}{effect}")
    return found


def _is_far(value: float, expected: float) -> bool:
    """Whether a value differs from the expected one by more than a factor of 4; 0: not known."""
    if not expected:
        return False
    return not expected / 4 <= value <= expected * 4


def _unused_settings(config: Config) -> Iterator[str]:
    for choice, used_by_kind in _USED_SETTINGS.items():
        section = choice.split(".")[0]
        kind = attrgetter(choice)(config)
        all_names = {name for names in used_by_kind.values() for name in names}
        for name in sorted(all_names - set(used_by_kind[kind])):
            key = f"{section}.{name}"
            value = attrgetter(key)(config)
            if value != attrgetter(key)(_DEFAULTS):
                yield f"{key} is {value!r}, which {choice} {kind} does not use"


def _schedule(config: Config) -> Iterator[str]:
    schedule, epochs = config.schedule, config.train.epochs
    if schedule.kind == "step" and max(schedule.milestones, default=0) >= epochs:
        yield f"schedule.milestones {schedule.milestones} reach beyond train.epochs, {epochs}"
    if schedule.warmup_kind == "constant" and not schedule.warmup_epochs:
        yield "schedule.warmup_kind is constant, without effect: schedule.warmup_epochs is 0"


def _label_smoothing(config: Config) -> Iterator[str]:
    is_mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
    train = config.train
    is_binary = train.loss == "bce" and train.bce_target_threshold
    if is_binary and train.label_smoothing and not is_mixed:
        yield (
            "train.label_smoothing has no effect: train.bce_target_threshold makes each target 0 "
            "or 1"
        )


def _start(config: Config) -> Iterator[str]:
    checkpoint, optim = config.checkpoint, config.optim
    if checkpoint.resume and checkpoint.init_from:
        yield "checkpoint.init_from is ignored: checkpoint.resume comes first"
    is_fine_tuning = optim.unfreeze_from or optim.backbone_lr_scale != 1.0
    if is_fine_tuning and not checkpoint.init_from and not checkpoint.resume:
        yield (
            "optim.unfreeze_from or optim.backbone_lr_scale holds back random weights: set "
            "checkpoint.init_from"
        )
    if optim.unfreeze_from == "head" and optim.backbone_lr_scale != 1.0:
        yield "optim.backbone_lr_scale has no effect where optim.unfreeze_from is head"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.kind == "synthetic" and data.data_dir:
        yield f"data.data_dir is {data.data_dir!r}, which synthetic data does not use"
    if data.train_crop != "random_resized" and data.crop_scale != _DEFAULTS.data.crop_scale:
        yield f"data.crop_scale is set, which data.train_crop {data.train_crop} does not use"


_CHECKS = (_unused_settings, _schedule, _label_smoothing, _start, _data)


def _device(config: Config, device: str) -> Iterator[str]:
    if config.train.precision == "fp16" and device == "cpu":
        yield (
            "train.precision is fp16, whose backward pass is about 100 times slower than bf16's on "
            "a CPU"
        )
    threads = config.distributed.threads
    if threads and device == "cuda":
        yield f"distributed.threads is {threads}, which has no effect on a GPU"


def _bf16(config: Config, device: str, has_fast_bf16: bool) -> Iterator[str]:
    if config.train.precision != "bf16" or has_fast_bf16:
        return
    if device == "cpu":
        yield (
            "train.precision is bf16, but this CPU has no instructions for it: about nine times "
            "slower than fp32, measured on an AVX2 CPU; use train.precision auto or fp32"
        )
    else:
        yield (
            "train.precision is bf16, but this GPU has no hardware for it, which makes it slow; "
            "use train.precision auto or fp16"
        )
