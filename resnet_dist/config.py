"""Every knob of a run, with its default and its meaning: a tree of frozen dataclasses.

The tree is filled from YAML files and the command line by jsonargparse (see cli.py). `check` holds the rules that
involve more than one key; what depends on the data or the number of ranks is checked where it is known (run.py).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """torchvision's spelling (resnet50, resnext50_32x4d, ...) or the CIFAR family (resnet20, resnet56, ...)"""
    num_classes: int | None = None
    """number of classes; null takes it from the data, a number must agree with the data"""
    zero_init_residual: bool = False
    """start every residual block as the identity (Goyal et al. 2017, section 5.1)"""
    stride_in_1x1: bool = False
    """stride of a bottleneck in its first 1x1 convolution (v1, He et al. 2015) instead of its 3x3 (v1.5)"""
    sync_batch_norm: bool = True
    """normalise over the samples of all ranks instead of each rank's own"""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are cut."""

    kind: Literal["folder", "digits", "synthetic"] = "folder"
    """folder: data_dir/train/<class>/ and data_dir/val/<class>/; digits: the embedded quickstart set, written to
    data_dir; synthetic: random pixels without any file, for speed tests"""
    data_dir: str = ""
    """folder that holds train/ and val/"""
    train_crop_size: int = 224
    """side of the training crop in pixels"""
    val_resize_size: int = 256
    """shorter side, in pixels, that an image is resized to before the central crop in evaluation"""
    val_crop_size: int = 224
    """side of the central crop in evaluation, in pixels"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """range of the random crop's area, as a fraction of the image's area"""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the random crop's aspect ratio, width over height"""
    flip_probability: float = 0.5
    """probability of a horizontal flip in training"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of R, G, B that is subtracted, for pixels in [0, 1]"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of R, G, B that is divided by, for pixels in [0, 1]"""
    val_batch_size: int = 128
    """images of one evaluation batch on a rank; has no influence on the result"""
    threads: int = 0
    """decoding threads of each rank; 0 = cores / ranks on this machine on the CPU, 4 on a GPU"""
    prefetch_batches: int = 3
    """batches that are kept ready ahead of training"""
    max_bad_images: int = 100
    """broken training images that are replaced by a neighbour before the run stops with an error, per rank and run"""
    synthetic_images: int = 1280
    """size of the synthetic training set; a tenth of it is the synthetic validation set"""
    synthetic_classes: int = 1000
    """number of classes of the synthetic set"""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum. The peak learning rate is base_lr * train.global_batch_size / base_batch_size."""

    base_lr: float = 0.1
    """learning rate for a batch of base_batch_size images (linear scaling, Goyal et al. 2017)"""
    base_batch_size: int = 256
    """batch size that base_lr is meant for; 0 = base_lr is the peak learning rate as it stands"""
    momentum: float = 0.9
    """momentum of SGD"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = 1e-4
    """L2 penalty on the weights of convolutions and linear layers"""
    norm_weight_decay: float | None = None
    """L2 penalty on the weights and biases of norm layers; null = as weight_decay"""
    bias_weight_decay: float | None = None
    """L2 penalty on the biases of convolutions and linear layers; null = as weight_decay"""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then decay; set anew at every step."""

    kind: Literal["cosine", "step"] = "cosine"
    """cosine: half a cosine from the peak to final_lr; step: times gamma at each milestone"""
    warmup_epochs: float = 5.0
    """length of the linear warm-up; 0 = none"""
    warmup_start_factor: float = 0.01
    """learning rate of the warm-up's first step, as a fraction of the peak; above zero"""
    milestones: tuple[float, ...] = (30.0, 60.0, 80.0)
    """epochs at which the step schedule decays"""
    gamma: float = 0.1
    """factor of the step schedule's decay"""
    final_lr: float = 0.0
    """learning rate that the cosine ends at"""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: float = 90.0
    """length of the run in passes over the training set"""
    global_batch_size: int = 256
    """images of one optimizer update, over all ranks and accumulated micro-steps"""
    grad_accum_steps: int = 1
    """micro-steps whose gradients are added up to one update"""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """arithmetic of the forward and backward pass (autocast); weights stay in fp32"""
    label_smoothing: float = 0.0
    """share of the target's mass that is spread over all classes (Szegedy et al. 2015, section 7)"""
    clip_grad_norm: float = 0.0
    """largest L2 norm of the gradient; 0 = no clipping"""
    ema_decay: float = 0.0
    """decay per step of an exponential moving average of the weights, evaluated too; 0 = none"""
    eval_interval_epochs: float = 1.0
    """epochs between evaluations; the end of the run is always evaluated; 0 = only then"""
    max_nonfinite_steps: int = 10
    """updates in a row with a gradient that is not finite (they are not applied) before the run stops"""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and what a run starts from. A valid checkpoint in output_dir always comes first."""

    interval_epochs: float = 1.0
    """epochs between checkpoints; the end of the run is always saved; 0 = not by epochs"""
    interval_steps: int = 0
    """steps between checkpoints, in addition; 0 = not by steps"""
    keep: int = 3
    """newest checkpoints that are kept, besides the best"""
    resume: str = ""
    """checkpoint to continue (weights, optimizer, step: everything) where output_dir has none yet"""
    init_from: str = ""
    """checkpoint to take the weights from, at step 0, where there is nothing to resume"""


@dataclass(frozen=True)
class LogConfig:
    """What is said, where and how often."""

    interval_steps: int = 50
    """steps between log lines; only here does training wait for the device"""
    progress_bar: bool = True
    """a progress bar where the output is a terminal"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto = online with a key and a network, else offline"""
    wandb_project: str = "resnet_dist"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B user or team; null = the account's default"""
    wandb_name: str | None = None
    """W&B name of the run; null = the name of output_dir"""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes. Their number comes from the launcher (torchrun, SLURM); it is speed, not recipe."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto = cuda where there is one"""
    timeout_s: float = 600.0
    """seconds after which a collective that waits for a rank is an error"""
    threads: int = 0
    """torch threads of each rank on the CPU; 0 = cores / ranks on this machine"""


@dataclass(frozen=True)
class Config:
    """Train a residual network on a folder of images, with one process per device."""

    output_dir: str = "runs/default"
    """folder of the run: checkpoints, resolved config, metrics.jsonl, W&B files; run again to resume from it"""
    seed: int = 0
    """seed of everything random: initial weights, order of the samples, crops, flips"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def to_dict(config: Config) -> dict:
    """The tree as nested plain dicts, lists and numbers, as YAML, JSON and a checkpoint can hold it."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
    return plain(dataclasses.asdict(config))


def check(config: Config) -> None:
    """Refuse what no data and no number of ranks can make right; raises ValueError naming key, value, rule, way out."""
    def rule(holds: bool, key: str, value, text: str) -> None:
        if not holds:
            raise ValueError(f"{key} is {value!r}: {text}")

    train, optim, schedule, data, saving = config.train, config.optim, config.schedule, config.data, config.checkpoint
    rule(bool(config.output_dir), "output_dir", config.output_dir, "name the folder of the run")
    rule(train.epochs > 0, "train.epochs", train.epochs, "it must be above 0")
    rule(train.global_batch_size > 0, "train.global_batch_size", train.global_batch_size, "it must be above 0")
    rule(train.grad_accum_steps > 0, "train.grad_accum_steps", train.grad_accum_steps, "it must be at least 1 (= off)")
    rule(0 <= train.label_smoothing < 1, "train.label_smoothing", train.label_smoothing, "it must be in [0, 1)")
    rule(train.clip_grad_norm >= 0, "train.clip_grad_norm", train.clip_grad_norm, "it must be above 0, or 0 for off")
    rule(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "it must be in [0, 1), for instance 0.9999")
    rule(train.max_nonfinite_steps > 0, "train.max_nonfinite_steps", train.max_nonfinite_steps, "it must be above 0")
    rule(train.eval_interval_epochs >= 0, "train.eval_interval_epochs", train.eval_interval_epochs, "it must be >= 0")
    rule(optim.base_lr > 0, "optim.base_lr", optim.base_lr, "it must be above 0")
    rule(optim.base_batch_size >= 0, "optim.base_batch_size", optim.base_batch_size, "it must be above 0, or 0 for off")
    rule(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "it must be in [0, 1)")
    rule(optim.momentum > 0 or not optim.nesterov, "optim.nesterov", optim.nesterov, "it needs optim.momentum above 0")
    rule(schedule.warmup_epochs >= 0, "schedule.warmup_epochs", schedule.warmup_epochs, "it must be >= 0")
    rule(schedule.warmup_epochs < train.epochs or schedule.warmup_epochs == 0, "schedule.warmup_epochs",
         schedule.warmup_epochs, f"it must be shorter than train.epochs, {train.epochs}")
    rule(0 < schedule.warmup_start_factor <= 1, "schedule.warmup_start_factor", schedule.warmup_start_factor,
         "it must be in (0, 1]: a first step of zero learns nothing")
    if schedule.kind == "step":
        rule(list(schedule.milestones) == sorted(set(schedule.milestones)), "schedule.milestones",
             schedule.milestones, "they must rise")
        rule(all(m > schedule.warmup_epochs for m in schedule.milestones), "schedule.milestones", schedule.milestones,
             f"they must come after schedule.warmup_epochs, {schedule.warmup_epochs}")
    for key in ("train_crop_size", "val_resize_size", "val_crop_size", "val_batch_size", "prefetch_batches"):
        rule(getattr(data, key) > 0, f"data.{key}", getattr(data, key), "it must be above 0")
    rule(data.val_resize_size >= data.val_crop_size, "data.val_resize_size", data.val_resize_size,
         f"it must not be below data.val_crop_size, {data.val_crop_size}: the crop would leave the image")
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(data, key)
        rule(0 < low <= high, f"data.{key}", (low, high), "it must be a range (low, high) with 0 < low <= high")
    rule(0 <= data.flip_probability <= 1, "data.flip_probability", data.flip_probability, "it must be in [0, 1]")
    rule(saving.keep > 0, "checkpoint.keep", saving.keep, "at least 1 is needed to resume from")
    rule(saving.interval_epochs >= 0, "checkpoint.interval_epochs", saving.interval_epochs, "it must be >= 0")
    rule(saving.interval_steps >= 0, "checkpoint.interval_steps", saving.interval_steps, "it must be >= 0")
    rule(config.log.interval_steps > 0, "log.interval_steps", config.log.interval_steps, "it must be above 0")
