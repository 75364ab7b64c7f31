"""What is worth a warning at the start of a run, and no error: settings without effect, or far from their recipe."""

from operator import attrgetter

from resnet_dist.config import Config

_USED_BY = {                                             # a choice, and the keys that only some of its kinds read
    "optim.kind": {
        "optim.momentum": ("sgd", "lars", "rmsprop"), "optim.nesterov": ("sgd",), "optim.trust_coefficient": ("lars",),
        "optim.betas": ("lamb", "adamw"), "optim.alpha": ("rmsprop",),
        "optim.eps": ("lars", "lamb", "rmsprop", "adamw")},
    "schedule.kind": {
        "schedule.milestones": ("step",), "schedule.gamma": ("step", "exponential"),
        "schedule.decay_epochs": ("exponential",), "schedule.power": ("polynomial",),
        "schedule.final_lr": ("cosine", "polynomial")},
    "train.loss": {"train.bce_target_threshold": ("bce",)},
}


def remarks(config: Config, device: str) -> list[str]:
    """Sentences about settings that have no effect as the others are, or a bad one, on `device` ("cuda", "cpu")."""
    schedule, plain, found = config.schedule, Config(), []
    for choice, users in _USED_BY.items():
        kind = attrgetter(choice)(config)
        for key, kinds in users.items():
            if kind not in kinds and (value := attrgetter(key)(config)) != attrgetter(key)(plain):
                found.append(f"{key} is {value!r}, which {choice} {kind} does not use")
    if schedule.kind == "step" and any(milestone >= config.train.epochs for milestone in schedule.milestones):
        found.append(f"schedule.milestones {schedule.milestones} reach beyond train.epochs, {config.train.epochs}")
    if config.train.loss == "bce" and config.train.bce_target_threshold and config.train.label_smoothing:
        found.append("train.label_smoothing has no effect: train.bce_target_threshold makes each target 0 or 1")
    if config.checkpoint.resume and config.checkpoint.init_from:
        found.append("checkpoint.init_from is set beside checkpoint.resume, which comes first")
    if config.data.kind == "synthetic" and config.data.data_dir:
        found.append(f"data.data_dir is {config.data.data_dir!r}, which synthetic data does not read")
    if config.data.train_crop != "random_resized" and config.data.crop_scale != plain.data.crop_scale:
        found.append(f"data.crop_scale is set, which data.train_crop {config.data.train_crop} does not use")
    if config.train.precision == "fp16" and device == "cpu":
        found.append("train.precision is fp16, whose backward pass is about 100 times slower than bf16's on a CPU")
    if config.distributed.threads and device == "cuda":
        found.append(f"distributed.threads is {config.distributed.threads}, which has no effect on a GPU")
    return found
