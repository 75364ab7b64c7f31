"""Every knob of a run, with its default and its meaning: a tree of frozen dataclasses.

The tree is filled from YAML files and the command line by jsonargparse (see cli.py). `check` holds
the rules that involve more than one key; what depends on the data or the number of ranks is checked
where it is known (run.py).
"""

import dataclasses
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """a name of `resnet-dist models`, in torchvision's spelling (resnet50, vgg16_bn) or CIFAR's
    (resnet20, plain56)"""
    num_classes: int | None = None
    """number of classes; null takes it from the data, a number must agree with the data"""
    zero_init_residual: bool = False
    """start every residual block as the identity (Goyal et al. 2017, section 5.1)"""
    stride_in_1x1: bool = False
    """stride of a bottleneck in its first 1x1 convolution (v1, He et al. 2015) instead of its 3x3
    (v1.5)"""
    shortcut: Literal["default", "A", "B", "C", "none"] = "default"
    """A: zero padding, B: projection where the shape changes, C: everywhere (He et al. 2015,
    section 4.1), none: a plain network; default, here and below: what belongs to the name. These
    are options of the ResNet family"""
    stem: Literal["default", "imagenet", "cifar", "deep"] = "default"
    """7x7 and max pool; 3x3 for small images; three 3x3 and max pool (ResNet-C, He et al. 2018)"""
    avg_pool_shortcut: bool = False
    """average before a projection of stride 2 (ResNet-D, He et al. 2018)"""
    preactivation: bool = False
    """norm and ReLU before the convolutions (He et al. 2016, "Identity Mappings")"""
    squeeze_excitation: bool = False
    """weigh the channels at the end of each block (Hu et al. 2017)"""
    stochastic_depth: float = 0.0
    """rate at which the last block is left out in training, rising linearly from 0 (Huang et al.
    2016)"""
    blur_pool: bool = False
    """blur before convolutions of stride 2, but for the stem's (Zhang 2019)"""
    sync_batch_norm: bool = True
    """normalise over the samples of all ranks; else each has its own, and evaluation takes those of
    the first"""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are cut."""

    kind: Literal["folder", "digits", "synthetic"] = "folder"
    """folder: data_dir/train/ and data_dir/val/ hold class folders, or tar shards of `resnet-dist
    data pack`; digits: the embedded quickstart set, written to data_dir; synthetic: random pixels
    without any file, for speed tests"""
    data_dir: str = ""
    """folder that holds train/ and val/"""
    exclude: str = ""
    """list of training images to leave out, one `train/<class>/<file>` a line, as `resnet-dist data
    verify` writes"""
    train_crop_size: int = 224
    """side of the training crop in pixels"""
    train_crop: Literal["random_resized", "scale_jitter", "pad"] = "random_resized"
    """random_resized: a window of random area and ratio (Szegedy et al. 2014); scale_jitter:
    shorter side drawn from scale_jitter, then a random square (Simonyan and Zisserman 2014); pad: a
    square of the padded image (CIFAR)"""
    scale_jitter: tuple[int, int] = (256, 480)
    """range of the shorter side, in pixels and both included, for train_crop scale_jitter"""
    pad: int = 4
    """black pixels on each side of an image of train_crop_size, for train_crop pad"""
    progressive_start_size: int = 0
    """side of the training crop at the start of the run; 0 = train_crop_size throughout"""
    progressive_epochs: tuple[float, float] = (0.0, 0.0)
    """epochs between which the side rises to train_crop_size, in multiples of 32; it changes
    between epochs"""
    val_resize_size: int = 256
    """shorter side, in pixels, that an image is resized to before the central crop in evaluation"""
    val_crop_size: int = 224
    """side of the central crop in evaluation, in pixels"""
    val_crops: Literal["center", "ten"] = "center"
    """ten: the four corners, the centre and their mirror images, averaged (Krizhevsky et al. 2012)
    """
    val_scales: tuple[int, ...] = ()
    """shorter sides whose central squares are averaged instead (He et al. 2015: 224, 256, 384, 480,
    640)"""
    val_flip: bool = False
    """average over each crop and its mirror image"""
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
    """broken training images that are replaced by a neighbour before the run stops with an error,
    per rank and run"""
    synthetic_images: int = 1280
    """size of the synthetic training set; a tenth of it is the synthetic validation set"""
    synthetic_classes: int = 1000
    """number of classes of the synthetic set"""


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a training image after it is cut and flipped, in this order. All of it is off
    by default.
    """

    policy: Literal["none", "randaugment", "trivialaugment", "autoaugment"] = "none"
    """RandAugment (Cubuk et al. 2019), TrivialAugmentWide (Mueller and Hutter 2021), AutoAugment
    for ImageNet (Cubuk et al. 2018)"""
    num_ops: int = 2
    """operations that RandAugment applies to an image"""
    magnitude: int = 9
    """strength of RandAugment, 0 to 30"""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """largest change of brightness, contrast, saturation and hue, in random order, as torchvision's
    ColorJitter"""
    lighting_std: float = 0.0
    """standard deviation of the PCA lighting noise (Krizhevsky et al. 2012); theirs is 0.1"""
    random_erasing: float = 0.0
    """probability that a rectangle of the normalised image is set to zero (Zhong et al. 2017)"""
    repeats: int = 1
    """differently cut copies of an image in one batch, which then holds fewer images (Hoffer et al.
    2019)"""
    mixup_alpha: float = 0.0
    """Beta(alpha, alpha) of mixup (Zhang et al. 2017)"""
    cutmix_alpha: float = 0.0
    """Beta(alpha, alpha) of CutMix (Yun et al. 2019); with mixup too, each step takes one of the
    two"""


@dataclass(frozen=True)
class OptimConfig:
    """The update. The peak learning rate is base_lr * train.global_batch_size / base_batch_size."""

    kind: Literal["sgd", "lars", "lamb", "rmsprop", "adamw"] = "sgd"
    """SGD; LARS (You et al. 2017) and LAMB (You et al. 2019) for large batches; RMSprop as
    TensorFlow has it; AdamW"""
    base_lr: float = 0.1
    """learning rate for a batch of base_batch_size images (linear scaling, Goyal et al. 2017)"""
    base_batch_size: int = 256
    """batch size that base_lr is meant for; 0 = base_lr is the peak learning rate as it stands"""
    momentum: float = 0.9
    """momentum of SGD, LARS and RMSprop"""
    nesterov: bool = False
    """Nesterov momentum, of SGD"""
    trust_coefficient: float = 0.001
    """LARS: learning rate of a weight tensor as a fraction of its norm over its gradient's"""
    betas: tuple[float, float] = (0.9, 0.999)
    """LAMB and AdamW: decay per step of the averages of the gradient and of its square"""
    alpha: float = 0.9
    """RMSprop: decay per step of the average of the gradient's square"""
    eps: float | None = None
    """added to the denominator; null = 0 for LARS, 1e-6 for LAMB, 1e-8 for AdamW and, below the
    root, for RMSprop"""
    weight_decay: float = 1e-4
    """L2 penalty on the weights of convolutions and linear layers; LAMB and AdamW decay them apart
    from the gradient"""
    norm_weight_decay: float | None = None
    """L2 penalty on the weights and biases of norm layers; null = as weight_decay"""
    bias_weight_decay: float | None = None
    """L2 penalty on the biases of convolutions and linear layers; null = as weight_decay"""
    unfreeze_from: str = ""
    """what is trained: empty = all; head = the classifier alone; a module (layer3, features.24) =
    it, all after it and the classifier. What comes before keeps its weights and running statistics
    """
    backbone_lr_scale: float = 1.0
    """learning rate of all but the classifier, as a multiple of the classifier's"""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: warm-up, then decay; set anew at every step."""

    kind: Literal["cosine", "step", "polynomial", "exponential"] = "cosine"
    """cosine: half a cosine from the peak to final_lr; step: times gamma at each milestone;
    polynomial: from the peak to final_lr with what is left of the run to the given power;
    exponential: times gamma every decay_epochs"""
    warmup_epochs: float = 5.0
    """length of the warm-up; 0 = none"""
    warmup_kind: Literal["linear", "constant"] = "linear"
    """linear: rises to the peak (Goyal et al. 2017); constant: stays low, then jumps (He et al.
    2015, section 4.2)"""
    warmup_start_factor: float = 0.01
    """learning rate of the warm-up's first step, as a fraction of the peak; above zero"""
    milestones: tuple[float, ...] = (30.0, 60.0, 80.0)
    """epochs at which the step schedule decays"""
    gamma: float = 0.1
    """factor of the step and the exponential schedule's decay"""
    decay_epochs: float = 2.4
    """epochs between the exponential schedule's decays, counted from the start of the run"""
    power: float = 2.0
    """power of the polynomial schedule"""
    final_lr: float = 0.0
    """learning rate that the cosine and the polynomial schedule end at"""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: float = 90.0
    """length of the run in passes over the training set"""
    global_batch_size: int = 256
    """images of one optimizer update, over all ranks and accumulated micro-steps"""
    grad_accum_steps: int = 1
    """micro-steps whose gradients are added up to one update"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """arithmetic of the forward and backward pass (autocast); weights stay in fp32. auto: bf16
    where the hardware has it, else fp16 on a GPU and fp32 on a CPU"""
    loss: Literal["ce", "bce"] = "ce"
    """ce: cross-entropy; bce: binary cross-entropy, mean over the classes (Wightman et al. 2021);
    val has ce always"""
    bce_target_threshold: float = 0.0
    """bce: targets above it become 1, the others 0, as in timm's recipes with 0.2; 0 = they stay
    soft"""
    label_smoothing: float = 0.0
    """share of the target's mass that is spread over all classes (Szegedy et al. 2015, section 7)
    """
    clip_grad_norm: float = 0.0
    """largest L2 norm of the gradient; 0 = no clipping"""
    ema_decay: float = 0.0
    """decay per step of an exponential moving average of the weights, evaluated too; 0 = none"""
    eval_interval_epochs: float = 1.0
    """epochs between evaluations; the end of the run is always evaluated; 0 = only then"""
    max_nonfinite_steps: int = 10
    """updates in a row with a gradient that is not finite (they are not applied) before the run
    stops"""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and what a run starts from. A valid checkpoint in output_dir always comes
    first.
    """

    interval_epochs: float = 1.0
    """epochs between checkpoints; the end of the run and each best evaluation are always saved; 0 =
    not by epochs"""
    interval_steps: int = 0
    """steps between checkpoints, in addition; 0 = not by steps"""
    keep: int = 3
    """newest checkpoints that are kept, besides the best"""
    resume: str = ""
    """checkpoint to continue (weights, optimizer, step: everything) where output_dir has none yet
    """
    init_from: str = ""
    """weights to start from, at step 0, where there is nothing to resume: a checkpoint of ours, a
    .pth, .pt or .safetensors of torchvision, timm or NVIDIA, or torchvision:resnet50:IMAGENET1K_V2,
    which is downloaded"""


@dataclass(frozen=True)
class LogConfig:
    """What is said, where and how often."""

    interval_steps: int = 50
    """steps between log lines; only here does training wait for the device"""
    progress_bar: bool = True
    """a progress bar where the output is a terminal"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto = online with a key and a network, else offline; online waits up to 30
    s for the server"""
    wandb_project: str = "resnet_dist"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B user or team; null = the account's default"""
    wandb_name: str | None = None
    """W&B name of the run; null = the name of output_dir"""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes. Their number comes from the launcher (torchrun, SLURM); it is speed, not
    recipe.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto = cuda where there is one"""
    timeout_s: float = 600.0
    """seconds after which a collective that waits for a rank is an error"""
    threads: int = 0
    """torch threads of each rank on the CPU; 0 = cores / ranks on this machine"""


@dataclass(frozen=True)
class RecipeConfig:
    """What the published figure of a recipe was made with; a run that is far from it says so."""

    global_batch_size: int = 0
    """images of one update; 0 = not said"""
    world_size: int = 0
    """number of ranks; 0 = not said"""


@dataclass(frozen=True)
class Config:
    """Train a residual network on a folder of images, with one process per device."""

    output_dir: str = "runs/default"
    """folder of the run: checkpoints, resolved config, metrics.jsonl, W&B files; run again to
    resume from it"""
    seed: int = 0
    """seed of everything random: initial weights, order of the samples, crops, flips"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


def to_dict(config: Config) -> dict:
    """The tree as nested plain dicts, lists and numbers, as YAML, JSON and a checkpoint can hold
    it.
    """

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


_ABOVE_ZERO = (lambda value: value > 0, "it must be above 0")
_NOT_NEGATIVE = (lambda value: value is None or value >= 0, "it must be 0 or above")
_BELOW_ONE = (lambda value: 0 <= value < 1, "it must be in [0, 1)")
_RULES = {
    "output_dir": (bool, "name the folder of the run"),
    "train.epochs": _ABOVE_ZERO,
    "train.global_batch_size": _ABOVE_ZERO,
    "train.max_nonfinite_steps": _ABOVE_ZERO,
    "train.grad_accum_steps": (
        lambda value: value > 0,
        "it must be at least 1, which means no accumulation",
    ),
    "train.label_smoothing": _BELOW_ONE,
    "train.bce_target_threshold": _BELOW_ONE,
    "model.stochastic_depth": _BELOW_ONE,
    "train.ema_decay": (
        lambda value: 0 <= value < 1,
        "it must be in [0, 1), for instance 0.9999; 0 is none",
    ),
    "train.clip_grad_norm": _NOT_NEGATIVE,
    "train.eval_interval_epochs": _NOT_NEGATIVE,
    "optim.base_lr": _ABOVE_ZERO,
    "optim.base_batch_size": _NOT_NEGATIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.norm_weight_decay": _NOT_NEGATIVE,
    "optim.bias_weight_decay": _NOT_NEGATIVE,
    "optim.momentum": _BELOW_ONE,
    "optim.alpha": _BELOW_ONE,
    "optim.trust_coefficient": _ABOVE_ZERO,
    "optim.betas": (lambda value: min(value) >= 0 and max(value) < 1, "both must be in [0, 1)"),
    "optim.backbone_lr_scale": (
        lambda value: value > 0,
        "it must be above 0; optim.unfreeze_from head trains no more",
    ),
    "optim.eps": _NOT_NEGATIVE,
    "schedule.decay_epochs": _ABOVE_ZERO,
    "schedule.power": _ABOVE_ZERO,
    "recipe.global_batch_size": _NOT_NEGATIVE,
    "recipe.world_size": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.final_lr": _NOT_NEGATIVE,
    "schedule.warmup_start_factor": (
        lambda value: 0 < value <= 1,
        "it must be in (0, 1]: zero learns nothing",
    ),
    "schedule.gamma": (lambda value: 0 < value <= 1, "it must be in (0, 1]"),
    "data.train_crop_size": _ABOVE_ZERO,
    "data.val_resize_size": _ABOVE_ZERO,
    "data.val_crop_size": _ABOVE_ZERO,
    "data.val_batch_size": _ABOVE_ZERO,
    "data.prefetch_batches": _ABOVE_ZERO,
    "data.synthetic_images": _ABOVE_ZERO,
    "data.synthetic_classes": _ABOVE_ZERO,
    "data.threads": _NOT_NEGATIVE,
    "data.max_bad_images": _NOT_NEGATIVE,
    "data.crop_scale": (
        lambda value: 0 < value[0] <= value[1] <= 1,
        "it must be (low, high), 0 < low <= high <= 1",
    ),
    "data.crop_ratio": (
        lambda value: 0 < value[0] <= value[1],
        "it must be (low, high), 0 < low <= high",
    ),
    "data.flip_probability": (lambda value: 0 <= value <= 1, "it must be in [0, 1]"),
    "data.std": (lambda value: min(value) > 0, "pixels are divided by it: it must be above 0"),
    "data.scale_jitter": (
        lambda value: 0 < value[0] <= value[1],
        "it must be (low, high), 0 < low <= high",
    ),
    "data.val_scales": (lambda value: min(value, default=1) > 0, "each must be above 0"),
    "data.pad": _NOT_NEGATIVE,
    "data.progressive_start_size": _NOT_NEGATIVE,
    "data.progressive_epochs": (
        lambda value: 0 <= value[0] <= value[1],
        "it must be (start, end), 0 <= start <= end",
    ),
    "augment.num_ops": _ABOVE_ZERO,
    "augment.magnitude": (lambda value: 0 <= value <= 30, "it must be in 0 to 30"),
    "augment.color_jitter": (
        lambda value: min(value) >= 0 and value[3] <= 0.5,
        "each must be 0 or above, hue <= 0.5",
    ),
    "augment.lighting_std": _NOT_NEGATIVE,
    "augment.repeats": _ABOVE_ZERO,
    "augment.random_erasing": (lambda value: 0 <= value <= 1, "it must be in [0, 1]"),
    "augment.mixup_alpha": _NOT_NEGATIVE,
    "augment.cutmix_alpha": _NOT_NEGATIVE,
    "checkpoint.keep": (lambda value: value > 0, "at least 1 is needed to resume from"),
    "checkpoint.interval_epochs": _NOT_NEGATIVE,
    "checkpoint.interval_steps": _NOT_NEGATIVE,
    "log.interval_steps": _ABOVE_ZERO,
    "distributed.timeout_s": _ABOVE_ZERO,
    "distributed.threads": _NOT_NEGATIVE,
}


def check(config: Config) -> None:
    """Refuse what no data and no number of ranks can make right; raises ValueError naming key,
    value, rule, way out.
    """

    def refuse(key: str, text: str) -> None:
        raise ValueError(f"{key} is {attrgetter(key)(config)!r}: {text}")

    for key, (holds, text) in _RULES.items():
        if not holds(attrgetter(key)(config)):
            refuse(key, text)
    epochs, schedule, data = config.train.epochs, config.schedule, config.data
    if config.optim.nesterov and not config.optim.momentum:
        refuse("optim.nesterov", "it needs optim.momentum above 0")
    if schedule.warmup_epochs and schedule.warmup_epochs >= epochs:
        refuse("schedule.warmup_epochs", f"it must be shorter than train.epochs, {epochs}")
    if schedule.kind == "step" and list(schedule.milestones) != sorted(set(schedule.milestones)):
        refuse("schedule.milestones", "they must rise")
    if schedule.kind == "step" and any(
        milestone <= schedule.warmup_epochs for milestone in schedule.milestones
    ):
        refuse(
            "schedule.milestones",
            f"they must come after schedule.warmup_epochs, {schedule.warmup_epochs}",
        )
    if data.train_crop == "scale_jitter" and data.scale_jitter[0] < data.train_crop_size:
        refuse(
            "data.scale_jitter",
            f"its lower end must not be below data.train_crop_size, {data.train_crop_size}",
        )
    if data.progressive_start_size > data.train_crop_size:
        refuse(
            "data.progressive_start_size",
            f"it must not be above data.train_crop_size, {data.train_crop_size}",
        )
    if data.progressive_start_size and not data.progressive_epochs[1]:
        refuse(
            "data.progressive_epochs",
            "say when the side has risen from data.progressive_start_size, as in [0, 60]",
        )
    if data.val_scales and data.val_crops == "ten":
        refuse(
            "data.val_scales",
            "they are central squares: take data.val_crops center, and data.val_flip if you like",
        )
    if data.val_resize_size < data.val_crop_size:
        refuse(
            "data.val_resize_size",
            f"it must not be below data.val_crop_size, {data.val_crop_size}: the crop would "
            "leave the image",
        )
