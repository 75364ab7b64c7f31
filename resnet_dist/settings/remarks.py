"""Warnings at the start of a run.

They are about settings that have no effect, that make the run slow, or that differ much from the
recipe. None of them is an error. Each check yields sentences that name the key and its value.
"""

from collections.abc import Iterator
from operator import attrgetter

from resnet_dist.config import Config

# For each kind of optimizer, schedule and loss: the settings of the same section that it uses. A
# setting that is in a table, but not used by the kind that is chosen, has no effect.
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
    "train.loss": {
        "ce": (),
        "bce": ("bce_target_threshold",),
    },
}
_DEFAULTS = Config()


def remarks(config: Config, device: str, has_fast_bf16: bool = True) -> list[str]:
    """All warnings about the settings alone.

    Args:
        config: the settings.
        device: "cuda" or "cpu".
        has_fast_bf16: whether the device has hardware for bf16.

    Returns:
        One sentence for each warning.
    """
    found: list[str] = []
    for check in _CHECKS:
        found.extend(check(config))
    found.extend(_device(config, device))
    found.extend(_bf16(config, device, has_fast_bf16))
    return found


def recipe_mismatch(config: Config, world_size: int) -> list[str]:
    """Warnings about a run that differs from its recipe by more than a factor of 4.

    This compares the global batch size, the number of ranks, and the number of images over which
    batch norm computes its statistics.

    Args:
        config: the settings; `recipe` says with which values the result of the recipe was reached.
        world_size: number of ranks of this run.

    Returns:
        One sentence for each warning.
    """
    recipe = config.recipe
    batch_size = config.train.global_batch_size
    sync_batch_norm = config.model.sync_batch_norm
    recipe_ranks = recipe.world_size or world_size
    found = []
    if _is_far(batch_size, recipe.global_batch_size):
        found.append(
            f"train.global_batch_size is {batch_size}, and the recipe's result was reached with "
            f"{recipe.global_batch_size}: expect another result, or use that batch size "
            "(train.grad_accum_steps saves memory)"
        )

    # Number of images of one forward pass on one rank.
    images = batch_size / world_size / config.train.grad_accum_steps
    recipe_images = (recipe.global_batch_size or batch_size) / recipe_ranks
    has_local_statistics = recipe.world_size and not sync_batch_norm
    if has_local_statistics and _is_far(images, recipe_images):
        way_out = "more ranks, or more train.grad_accum_steps"
        if images < recipe_images:
            way_out = "model.sync_batch_norm true, or fewer ranks and train.grad_accum_steps"
        found.append(
            f"batch norm statistics are over {images:g} images, on the recipe's {recipe_ranks} "
            f"ranks over {recipe_images:g}: use {way_out}"
        )
    elif _is_far(world_size, recipe_ranks):
        effect = "" if sync_batch_norm else ": only the time it takes should differ"
        found.append(f"this run has {world_size} ranks, the recipe {recipe_ranks}{effect}")
    return found


def _is_far(value: float, expected: float) -> bool:
    """Whether a value differs from the expected one by more than a factor of 4.

    An expected value of 0 is unknown, and nothing differs from it.
    """
    if not expected:
        return False
    is_near = expected / 4 <= value <= expected * 4
    return not is_near


def _unused_settings(config: Config) -> Iterator[str]:
    """Settings that were changed, but that the chosen optimizer, schedule or loss does not use."""
    for choice, used_by_kind in _USED_SETTINGS.items():
        section = choice.split(".")[0]
        kind = attrgetter(choice)(config)
        unused: set[str] = set()
        for names in used_by_kind.values():
            unused.update(names)
        unused.difference_update(used_by_kind[kind])
        for name in sorted(unused):
            key = f"{section}.{name}"
            read_setting = attrgetter(key)
            value = read_setting(config)
            if value != read_setting(_DEFAULTS):
                yield f"{key} is {value!r}, which {choice} {kind} does not use"


def _schedule(config: Config) -> Iterator[str]:
    """Settings of the schedule that have no effect."""
    schedule = config.schedule
    epochs = config.train.epochs
    last_milestone = max(schedule.milestones, default=0)
    if schedule.kind == "step" and last_milestone >= epochs:
        yield f"schedule.milestones {schedule.milestones} reach beyond train.epochs, {epochs}"
    if schedule.warmup_kind == "constant" and not schedule.warmup_epochs:
        yield "schedule.warmup_kind is constant, without effect: schedule.warmup_epochs is 0"


def _distillation(config: Config) -> Iterator[str]:
    """Settings of a distillation without a teacher, and of a loss that has no weight."""
    train = config.train
    names: tuple[str, ...] = ()
    reason = ""
    if not train.teacher:
        names = ("teacher_model", "distillation_weight", "distillation_temperature")
        reason = "train.teacher is empty"
    elif train.distillation_weight == 1:
        names = ("loss", "label_smoothing")
        reason = "train.distillation_weight is 1"
    for name in names:
        value = getattr(train, name)
        if value != getattr(_DEFAULTS.train, name):
            yield f"train.{name} is {value!r}, without effect: {reason}"


def _label_smoothing(config: Config) -> Iterator[str]:
    """Label smoothing that is undone by the threshold of the binary loss."""
    is_mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
    train = config.train
    is_binary = train.loss == "bce" and train.bce_target_threshold
    if is_binary and train.label_smoothing and not is_mixed:
        yield (
            "train.label_smoothing has no effect: train.bce_target_threshold makes each target 0 "
            "or 1"
        )


def _start(config: Config) -> Iterator[str]:
    """Settings that do not fit to the weights that the run starts from."""
    checkpoint = config.checkpoint
    optim = config.optim
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
    """Settings of the data that have no effect."""
    data = config.data
    if data.kind == "synthetic" and data.data_dir:
        yield f"data.data_dir is {data.data_dir!r}, which synthetic data does not use"
    scale_is_set = data.crop_scale != _DEFAULTS.data.crop_scale
    if scale_is_set and data.train_crop != "random_resized":
        yield f"data.crop_scale is set, which data.train_crop {data.train_crop} does not use"


_CHECKS = (
    _unused_settings,
    _schedule,
    _distillation,
    _label_smoothing,
    _start,
    _data,
)


def _device(config: Config, device: str) -> Iterator[str]:
    """Settings that are slow or have no effect on the device."""
    if config.train.precision == "fp16" and device == "cpu":
        yield (
            "train.precision is fp16, whose backward pass is about 100 times slower than bf16's on "
            "a CPU"
        )
    mode = config.train.compile_mode
    if mode != "default" and (config.train.compile is False or device == "cpu"):
        yield (
            f"train.compile_mode is {mode}, which has an effect only on a GPU with train.compile "
            "true"
        )
    threads = config.distributed.threads
    if threads and device == "cuda":
        yield f"distributed.threads is {threads}, which has no effect on a GPU"


def _bf16(config: Config, device: str, has_fast_bf16: bool) -> Iterator[str]:
    """bf16 on a device without hardware for it."""
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
