"""What is worth a warning at the start of a run, and no error: settings without effect, or far from
their recipe.
"""

from operator import attrgetter

from resnet_dist.config import Config

_READS = {  # a choice, and the keys beside it that each of its kinds reads
    "optim.kind": {
        "sgd": "momentum nesterov",
        "lars": "momentum trust_coefficient eps",
        "lamb": "betas eps",
        "rmsprop": "momentum alpha eps",
        "adamw": "betas eps",
    },
    "schedule.kind": {
        "cosine": "final_lr",
        "step": "milestones gamma",
        "polynomial": "power final_lr",
        "exponential": "gamma decay_epochs",
    },
    "train.loss": {"ce": "", "bce": "bce_target_threshold"},
}


def remarks(config: Config, device: str) -> list[str]:
    """Sentences about settings that have no effect as the others are, or a bad one, on `device`
    ("cuda", "cpu").
    """
    schedule, plain, found = config.schedule, Config(), []
    for choice, kinds in _READS.items():
        kind, section = attrgetter(choice)(config), attrgetter(choice.split(".")[0])
        for key in sorted({*" ".join(kinds.values()).split()} - {*kinds[kind].split()}):
            if (value := getattr(section(config), key)) != getattr(section(plain), key):
                found.append(
                    f"{choice.split('.')[0]}.{key} is {value!r}, which {choice} {kind} does not use"
                )
    if schedule.kind == "step" and any(
        milestone >= config.train.epochs for milestone in schedule.milestones
    ):
        found.append(
            f"schedule.milestones {schedule.milestones} reach beyond train.epochs, {config.train.epochs}"
        )
    if schedule.warmup_kind == "constant" and not schedule.warmup_epochs:
        found.append(
            "schedule.warmup_kind is constant, which has no effect: schedule.warmup_epochs is 0"
        )
    mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
    if (
        config.train.loss == "bce"
        and config.train.bce_target_threshold
        and config.train.label_smoothing
        and not mixed
    ):
        found.append(
            "train.label_smoothing has no effect: train.bce_target_threshold makes each target 0 or 1"
        )
    if config.checkpoint.resume and config.checkpoint.init_from:
        found.append("checkpoint.init_from is set beside checkpoint.resume, which comes first")
    optim, start = config.optim, config.checkpoint.init_from or config.checkpoint.resume
    if not start and (optim.unfreeze_from or optim.backbone_lr_scale != 1.0):
        found.append(
            "optim.unfreeze_from or backbone_lr_scale holds back random weights: set checkpoint.init_from"
        )
    if optim.unfreeze_from == "head" and optim.backbone_lr_scale != 1.0:
        found.append("optim.backbone_lr_scale has no effect where optim.unfreeze_from is head")
    if config.data.kind == "synthetic" and config.data.data_dir:
        found.append(
            f"data.data_dir is {config.data.data_dir!r}, which synthetic data does not read"
        )
    if (
        config.data.train_crop != "random_resized"
        and config.data.crop_scale != plain.data.crop_scale
    ):
        found.append(
            f"data.crop_scale is set, which data.train_crop {config.data.train_crop} does not use"
        )
    if config.train.precision == "fp16" and device == "cpu":
        found.append(
            "train.precision is fp16, whose backward pass is about 100 times slower than bf16's on a CPU"
        )
    if config.distributed.threads and device == "cuda":
        found.append(
            f"distributed.threads is {config.distributed.threads}, which has no effect on a GPU"
        )
    return found


def far_from_recipe(config: Config, world_size: int) -> list[str]:
    """Sentences about a batch, ranks, or images that a norm layer sees at once, over 4 times off
    the recipe's.
    """
    recipe, batch, found = config.recipe, config.train.global_batch_size, []
    ranks = recipe.world_size or world_size
    seen, meant = (
        batch / world_size / config.train.grad_accum_steps,
        (recipe.global_batch_size or batch) / ranks,
    )
    if _far(batch, recipe.global_batch_size):
        found.append(
            f"train.global_batch_size is {batch}, and the recipe's figure was reached with "
            f"{recipe.global_batch_size}: expect another, or take that (train.grad_accum_steps saves memory)"
        )
    if recipe.world_size and not config.model.sync_batch_norm and _far(seen, meant):
        way = (
            "model.sync_batch_norm true, or fewer ranks and train.grad_accum_steps"
            if seen < meant
            else "more ranks, or more train.grad_accum_steps"
        )
        found.append(
            f"a norm layer sees {seen:g} images at once, on the recipe's {ranks} ranks {meant:g}: take {way}"
        )
    elif _far(world_size, ranks):
        same = "" if config.model.sync_batch_norm else ": only the time it takes should differ"
        found.append(f"this run has {world_size} ranks, the recipe {ranks}{same}")
    return found


def _far(value: float, meant: float) -> bool:
    return bool(meant) and not meant / 4 <= value <= meant * 4
