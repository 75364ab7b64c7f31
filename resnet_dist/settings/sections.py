"""The sections of the config: each setting with its type, default, rule and meaning."""

from dataclasses import dataclass
from typing import Annotated, Literal

from resnet_dist.addresses import check_url, without_secrets
from resnet_dist.files import expand_path
from resnet_dist.settings.rules import (
    Above,
    AtLeast,
    BelowOne,
    Factor,
    Range,
    SettingError,
    Within,
)


def expand_paths(section: object, *names: str, prefix: str = "") -> None:
    """Expand `~` and environment variables in settings that are paths, as a shell does.

    Args:
        section: The dataclass that holds the settings. They are replaced in place.
        names: The settings.
        prefix: The name of the section and a dot, for the error.

    Raises:
        SettingError: An environment variable is not set.
    """
    for name in names:
        path = getattr(section, name)
        if not isinstance(path, str):
            # The check of types, which comes later, names the setting.
            continue
        try:
            expanded = expand_path(path)
        except ValueError as problem:
            raise SettingError(f"{prefix}{name}", path, str(problem)) from None
        # The dataclass is frozen once it is built.
        object.__setattr__(section, name, expanded)


def check_address(section: object, name: str, prefix: str = "") -> None:
    """Check a setting that may be the address of an object store, as `expand_paths`.

    Raises:
        SettingError: The address cannot be used, or holds credentials.
    """
    address = getattr(section, name)
    if not isinstance(address, str):
        return
    try:
        checked = check_url(address)
    except ValueError as problem:
        raise SettingError(f"{prefix}{name}", without_secrets(address), str(problem)) from None
    object.__setattr__(section, name, checked)


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """name of the network, as listed by `resnet-dist models`: torchvision's name (resnet50,
    vgg16_bn) or that of a CIFAR network (resnet20, plain56)"""
    num_classes: Annotated[int | None, AtLeast(1)] = None
    """number of classes; null: take it from the data. A number must agree with the data"""
    zero_init_residual: bool = False
    """initialize the last batch norm of each residual block with zero, so that the block starts as
    the identity (Goyal et al. 2017, section 5.1)"""
    stride_in_1x1: bool = False
    """put the stride of a bottleneck block into its first 1x1 convolution (v1, He et al. 2015)
    instead of its 3x3 convolution (v1.5)"""
    shortcut: Literal["default", "A", "A_symmetric", "B", "C", "none"] = "default"
    """shortcut connections of a ResNet (He et al. 2015, section 4.1). A: identity with zero
    padding behind the channels; A_symmetric: padding on both sides of them, for weights of
    networks that pad so; B: projection where the shape changes; C: projection everywhere; none: no
    shortcuts; default: what the name of the network says"""
    stem: Literal["default", "imagenet", "cifar", "deep", "deep_strided"] = "default"
    """first layers of a ResNet. imagenet: 7x7 convolution and max pool; cifar: 3x3 convolution;
    deep: three 3x3 convolutions and max pool (ResNet-C, He et al. 2018); deep_strided: four 3x3
    convolutions (ResNet-RS, Bello et al. 2021); default: what the name of the network says"""
    avg_pool_shortcut: bool = False
    """average pool before each projection with stride 2 (ResNet-D, He et al. 2018)"""
    preactivation: bool = False
    """batch norm and ReLU before each convolution ("Identity Mappings", He et al. 2016)"""
    squeeze_excitation: bool = False
    """add squeeze-and-excitation to each block (Hu et al. 2017)"""
    stochastic_depth: Annotated[float, BelowOne()] = 0.0
    """probability of dropping the last residual block in training; it rises linearly from 0 at the
    first block (Huang et al. 2016)"""
    dropout: Annotated[float, BelowOne()] = 0.0
    """probability of setting a feature before the classifier of a ResNet to zero in training
    (Srivastava et al. 2014)"""
    blur_pool: bool = False
    """blur before each convolution with stride 2, except in the stem (Zhang 2019)"""
    sync_batch_norm: bool = True
    """compute batch norm statistics over the images of all ranks. false: each rank uses its own
    images, and the running statistics of rank 0 are used in evaluation"""


@dataclass(frozen=True)
class DataConfig:
    """The images, and how they are read and cropped."""

    kind: Literal["folder", "digits", "synthetic"] = "folder"
    """folder: data_dir/train/ and data_dir/val/ hold one folder per class, or the tar shards of
    `resnet-dist data pack`; digits: the small data set of the quickstart, which is part of this
    package and is written to data_dir; synthetic: random pixels without files, for speed tests"""
    data_dir: str = ""
    """folder that holds train/ and val/, or the address of one with tar shards:
    s3://bucket/folder, gs://bucket/folder or https://host/folder"""
    cache_dir: str = ""
    """folder on a local disk for images from an object store, shared by the ranks of a machine;
    empty: no cache"""
    cache_gb: Annotated[float, Above(0)] = 100.0
    """largest size of cache_dir in GB (10^9 bytes). When it is full, images of other data sets make
    room, the least recently used first"""
    exclude: str = ""
    """text file with training images to leave out, one `train/<class>/<file>` per line, as written
    by `resnet-dist data verify`"""
    rescan: Literal["auto", "always", "never"] = "auto"
    """when the list of images that is kept beside the data is made anew. auto: if the times of a
    class folder, or the name or size of a shard, have changed; where the file system does not keep
    the times of folders (mounts of object stores), at every start. never: the list is trusted"""
    max_pixels: Annotated[int, AtLeast(1)] = 67_108_864
    """largest number of pixels of an image; a larger one counts as broken, since a few of them can
    fill the memory. No image of ImageNet has more than 38.5 million"""
    max_file_mb: Annotated[int, AtLeast(1)] = 256
    """largest size of an image's file in MiB; a larger one counts as broken"""
    read_timeout_s: Annotated[float, Above(0)] = 300.0
    """seconds that the storage may take to deliver one image; then it counts as broken"""
    train_crop_size: Annotated[int, AtLeast(1)] = 224
    """height and width of a training image in pixels"""
    train_crop: Literal["random_resized", "scale_jitter", "pad"] = "random_resized"
    """random_resized: crop with random area and aspect ratio (Szegedy et al. 2014), as
    torchvision's RandomResizedCrop; scale_jitter: resize the shorter side to a random size, then
    crop a random square (Simonyan and Zisserman 2014); pad: crop a random square of the padded
    image (CIFAR)"""
    scale_jitter: Annotated[tuple[int, int], AtLeast(1), Range()] = (256, 480)
    """smallest and largest size of the shorter side in pixels, for train_crop scale_jitter"""
    pad: Annotated[int, AtLeast(0)] = 4
    """black pixels added to each side of an image of train_crop_size, for train_crop pad"""
    progressive_start_size: Annotated[int, AtLeast(0)] = 0
    """image size at the start of training, for progressive resizing; 0: train_crop_size in all
    epochs"""
    progressive_epochs: Annotated[tuple[float, float], AtLeast(0), Range()] = (0.0, 0.0)
    """first and last epoch of the growth from progressive_start_size to train_crop_size. The size
    changes between epochs. It is a multiple of 32, or of 8 if train_crop_size is at most 32"""
    val_resize_size: Annotated[int, AtLeast(1)] = 256
    """size of the shorter side in pixels after resizing, before the center crop, in evaluation"""
    val_crop_size: Annotated[int, AtLeast(1)] = 224
    """height and width of the center crop in pixels, in evaluation"""
    val_crops: Literal["center", "ten"] = "center"
    """crops of an image that are evaluated and averaged. ten: the four corners, the center, and
    their mirror images (Krizhevsky et al. 2012)"""
    val_scales: Annotated[tuple[int, ...], AtLeast(1)] = ()
    """sizes of the shorter side in pixels: evaluate the center square at each size and average
    (He et al. 2015: 224, 256, 384, 480, 640)"""
    val_flip: bool = False
    """average the prediction over each crop and its mirror image"""
    crop_scale: Annotated[tuple[float, float], Above(0), Within(0, 1), Range()] = (0.08, 1.0)
    """smallest and largest area of a random crop, as a fraction of the image area"""
    crop_ratio: Annotated[tuple[float, float], Above(0), Range()] = (0.75, 4 / 3)
    """smallest and largest aspect ratio (width / height) of a random crop"""
    flip_probability: Annotated[float, Within(0, 1)] = 0.5
    """probability of a horizontal flip in training"""
    train_interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """filter of the resize in training, with antialiasing. random: bilinear or bicubic with equal
    probability, drawn for each image, as in timm"""
    val_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """filter of the resize in evaluation, with antialiasing, as Pillow computes it"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of the R, G and B channels, for pixel values in [0, 1]"""
    std: Annotated[tuple[float, float, float], Above(0, "since pixels are divided by it")] = (
        0.229,
        0.224,
        0.225,
    )
    """standard deviation of the R, G and B channels, for pixel values in [0, 1]"""
    val_batch_size: Annotated[int, AtLeast(1)] = 128
    """images per evaluation batch on each rank. It does not change the result"""
    threads: Annotated[int, AtLeast(0)] = 0
    """data loading threads of each rank; 0: CPU cores / ranks of this machine, on a GPU at most
    8"""
    prefetch_batches: Annotated[int, AtLeast(1)] = 3
    """batches that are loaded ahead of training"""
    train_cache: Literal["off", "host", "device", "auto"] = "off"
    """keep the decoded training images in memory, for small sets: they are decoded once at the
    start. host: in one file for each machine, in TMPDIR, which its ranks map; device: on each GPU,
    for images of one size that are neither resized nor augmented by a policy or colour jitter; on
    the CPU the same as host; auto: device, host or off, whatever fits"""
    val_cache: Literal["auto", "off"] = "auto"
    """keep the decoded squares of the first evaluation in host memory, so that later evaluations of
    the run decode nothing; each rank keeps its own share. auto: if they fit into a quarter of the
    free memory"""
    max_bad_images: Annotated[int, AtLeast(0)] = 100
    """number of broken training images per rank and run that are replaced by a neighbour; one more
    stops the run with an error"""
    synthetic_images: Annotated[int, AtLeast(1)] = 1280
    """number of synthetic training images; there are a tenth as many validation images"""
    synthetic_classes: Annotated[int, AtLeast(1)] = 1000
    """number of classes of the synthetic data"""

    def __post_init__(self) -> None:
        expand_paths(self, "data_dir", "exclude", "cache_dir", prefix="data.")
        check_address(self, "data_dir", prefix="data.")


@dataclass(frozen=True)
class DecoderConfig:
    """JPEG decoding by DALI on a GPU: how the work is divided and which memory is reserved. On the
    CPU only `queue_depth` has a meaning.
    """

    hw_decoder_load: Annotated[float, Within(0, 1)] = 0.9
    """fraction of a batch for the JPEG hardware of A100, H100 and later GPUs; CUDA kernels decode
    the rest. Without meaning on a GPU that has no such hardware"""
    preallocate_width: Annotated[int, AtLeast(0)] = 0
    """width of the largest image, in pixels: its memory is reserved at the start, which saves
    allocations later. 0: reserve when an image needs it"""
    preallocate_height: Annotated[int, AtLeast(0)] = 0
    """height of the largest image, in pixels, like preallocate_width"""
    device_memory_padding_mb: Annotated[int, AtLeast(0)] = 16
    """GPU memory reserved at the start for each decoding thread, in MiB; it grows when an image
    needs more"""
    host_memory_padding_mb: Annotated[int, AtLeast(0)] = 8
    """pinned CPU memory reserved at the start for each decoding thread, in MiB; it grows when an
    image needs more"""
    queue_depth: Annotated[int, AtLeast(1)] = 2
    """batches that the decoder has at the same time; more take more memory"""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of a training image after crop and flip, in this order. All off by default."""

    policy: Literal[
        "none", "randaugment", "randaugment_increasing", "trivialaugment", "autoaugment"
    ] = "none"
    """randaugment: RandAugment (Cubuk et al. 2019) as in torchvision; randaugment_increasing: the
    form of timm's recipes (rand-m7-mstd0.5-inc1), whose operations all get stronger with the
    magnitude and are each applied with probability 0.5; trivialaugment: TrivialAugmentWide (Mueller
    and Hutter 2021); autoaugment: AutoAugment with the ImageNet policy (Cubuk et al. 2018)"""
    num_ops: Annotated[int, AtLeast(1)] = 2
    """number of operations that RandAugment draws for an image"""
    magnitude: Annotated[int, Within(0, 30)] = 9
    """magnitude of RandAugment's operations: 0 to 30 for randaugment, 0 to 10 for
    randaugment_increasing"""
    magnitude_std: Annotated[float, AtLeast(0)] = 0.0
    """standard deviation of a normal distribution around magnitude, from which
    randaugment_increasing draws the magnitude of each operation (timm's mstd); 0: no variation"""
    color_jitter: Annotated[tuple[float, float, float, float], AtLeast(0)] = (0.0, 0.0, 0.0, 0.0)
    """largest change of brightness, contrast, saturation and hue, applied in random order, as in
    torchvision's ColorJitter"""
    lighting_std: Annotated[float, AtLeast(0)] = 0.0
    """standard deviation of the PCA lighting noise (Krizhevsky et al. 2012, who use 0.1)"""
    random_erasing: Annotated[float, Within(0, 1)] = 0.0
    """probability of setting a random rectangle of the normalized image to zero (Zhong et al.
    2017)"""
    repeats: Annotated[int, AtLeast(1)] = 1
    """number of differently augmented copies of an image in a batch, for repeated augmentation
    (Hoffer et al. 2019). The batch then has fewer different images"""
    mixup_alpha: Annotated[float, AtLeast(0)] = 0.0
    """alpha of mixup, whose weight is drawn from Beta(alpha, alpha) (Zhang et al. 2017); 0: no
    mixup"""
    cutmix_alpha: Annotated[float, AtLeast(0)] = 0.0
    """alpha of CutMix (Yun et al. 2019); 0: no CutMix. With mixup too, each block of images uses
    one of the two at random"""
    mix_block: Annotated[int | None, AtLeast(0)] = 0
    """number of images, consecutive in the global batch, that share one mixing factor and one
    CutMix box. torchvision, timm and NVIDIA draw one for the images of each GPU. null: the images
    per GPU of the recipe (recipe.local_batch_size, or recipe.global_batch_size /
    recipe.world_size); 2: each pair of images; 0: all images of the global batch. Unless it is 0,
    each of the augment.repeats copies of an image is mixed with another image"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    The peak learning rate is base_lr * train.global_batch_size / base_batch_size.
    """

    kind: Literal["sgd", "lars", "lamb", "rmsprop", "adamw"] = "sgd"
    """SGD; LARS (You et al. 2017) and LAMB (You et al. 2019), for large batches; RMSprop in
    TensorFlow's form; AdamW"""
    base_lr: Annotated[float, Above(0)] = 0.1
    """learning rate for a batch of base_batch_size images (linear scaling rule, Goyal et al. 2017)
    """
    base_batch_size: Annotated[int, AtLeast(0)] = 256
    """batch size that base_lr belongs to; 0: base_lr is the peak learning rate for any batch size
    """
    momentum: Annotated[float, BelowOne()] = 0.9
    """momentum of SGD, LARS and RMSprop"""
    nesterov: bool = False
    """use Nesterov momentum in SGD"""
    trust_coefficient: Annotated[float, Above(0)] = 0.001
    """LARS: factor of the ratio of weight norm to gradient norm"""
    betas: Annotated[tuple[float, float], BelowOne("each of both")] = (0.9, 0.999)
    """LAMB and AdamW: decay of the running averages of the gradient and of its square"""
    alpha: Annotated[float, BelowOne()] = 0.9
    """RMSprop: decay of the running average of the squared gradient"""
    eps: Annotated[float | None, AtLeast(0)] = None
    """term added to the denominator for numerical stability (RMSprop: inside the square root);
    null: 0 for LARS, 1e-6 for LAMB, 1e-8 for AdamW and RMSprop"""
    weight_decay: Annotated[float, AtLeast(0)] = 1e-4
    """weight decay of the weights of convolutions and linear layers; decoupled from the gradient
    in LAMB and AdamW, an L2 penalty in the others"""
    norm_weight_decay: Annotated[float | None, AtLeast(0)] = None
    """weight decay of the weights and biases of norm layers; null: same as weight_decay"""
    bias_weight_decay: Annotated[float | None, AtLeast(0)] = None
    """weight decay of the biases of convolutions and linear layers; null: same as weight_decay"""
    unfreeze_from: str = ""
    """parts of the network that are trained. Empty: all; head: only the classifier; the name of a
    module (layer3, features.24): this module, all later ones and the classifier. The others keep
    their weights and running statistics"""
    backbone_lr_scale: Annotated[
        float, Above(0, "use optim.unfreeze_from head to train only the classifier")
    ] = 1.0
    """factor of the learning rate for all parameters except the classifier's"""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule: warm-up, then decay. The learning rate changes at every step."""

    kind: Literal["cosine", "step", "polynomial", "exponential"] = "cosine"
    """cosine: half a cosine from the peak to final_lr; step: multiplied by gamma at each milestone;
    polynomial: from the peak to final_lr, with the remaining part of the run to the given power;
    exponential: multiplied by gamma every decay_epochs"""
    warmup_epochs: Annotated[float, AtLeast(0)] = 5.0
    """length of the warm-up in epochs; 0: no warm-up"""
    warmup_kind: Literal["linear", "constant"] = "linear"
    """linear: rise linearly to the peak (Goyal et al. 2017); constant: a low learning rate until
    the end of the warm-up (He et al. 2015, section 4.2)"""
    warmup_start_factor: Annotated[float, Factor("since nothing is learned at 0")] = 0.01
    """learning rate of the first step, as a fraction of the peak"""
    milestones: tuple[float, ...] = (30.0, 60.0, 80.0)
    """epochs at which the step schedule decays"""
    gamma: Annotated[float, Factor()] = 0.1
    """decay factor of the step and exponential schedules"""
    decay_epochs: Annotated[float, Above(0)] = 2.4
    """epochs between decays of the exponential schedule, counted from the start of the run"""
    power: Annotated[float, Above(0)] = 2.0
    """power of the polynomial schedule"""
    final_lr: Annotated[float, AtLeast(0)] = 0.0
    """learning rate at the end of the cosine and polynomial schedules"""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: Annotated[float, Above(0)] = 90.0
    """number of epochs; may be a fraction"""
    global_batch_size: Annotated[int, AtLeast(1)] = 256
    """images per optimizer update, over all ranks and micro-steps"""
    grad_accum_steps: Annotated[int, AtLeast(1, "which means no accumulation")] = 1
    """number of micro-steps whose gradients are accumulated for one update"""
    max_local_batch: Annotated[int, AtLeast(0)] = 0
    """largest number of images of a rank and micro-step. Where there would be more, for instance
    since an elastic launcher comes back with fewer ranks, grad_accum_steps is raised; this changes
    the statistics of batch norm. 0: no limit"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of the forward and backward pass (autocast); weights stay in fp32. auto: bf16 if
    the hardware supports it, otherwise fp16 on a GPU and fp32 on a CPU"""
    tf32: bool = False
    """let a GPU of the Ampere generation or later round the inputs of float32 convolutions and
    matrix products to TF32 (10 bits of mantissa), which is faster. false: fp32 means float32"""
    deterministic: bool = False
    """on a GPU, use only deterministic algorithms and do not choose algorithms by timing, neither
    for convolutions nor in torch.compile. Slower. On a CPU training is always deterministic"""
    compile: Literal["auto"] | bool = "auto"
    """compile the network with torch.compile, part by part (stem, each stage, head). auto: on a
    GPU, unless compilation fails; true: a failure is an error. A run that resumes keeps what it
    started with. Evaluation is never compiled"""
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """mode of torch.compile. reduce-overhead: replay the kernels as CUDA graphs, which helps where
    their launch is the limit (small images, small batches); it takes more memory, and needs
    grad_accum_steps 1"""
    loss: Literal["ce", "bce"] = "ce"
    """training loss. ce: cross-entropy; bce: binary cross-entropy, averaged over the classes
    (Wightman et al. 2021). Evaluation always uses cross-entropy"""
    bce_target_threshold: Annotated[float, BelowOne()] = 0.0
    """bce: targets above the threshold become 1, the others 0, as in timm (recipes use 0.2); 0:
    keep soft targets"""
    label_smoothing: Annotated[float, BelowOne()] = 0.0
    """label smoothing (Szegedy et al. 2015, section 7)"""
    teacher: str = ""
    """trained network whose predictions are learned (distillation): a run folder, a checkpoint, a
    file of another program with teacher_model, or torchvision:resnet152:IMAGENET1K_V2. It sees the
    same images as the network that is trained, after augmentation and mixing. Empty: none"""
    teacher_model: str = ""
    """name of the teacher's network, as model.name, for a file that does not say it"""
    distillation_weight: Annotated[float, Within(0, 1)] = 1.0
    """weight of the distillation loss; the loss of the labels has 1 - distillation_weight. 1: the
    labels are not used (Beyer et al. 2021, "Knowledge distillation: A good teacher is patient and
    consistent")"""
    distillation_temperature: Annotated[float, Above(0)] = 1.0
    """temperature that divides the logits of both networks before the softmax (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 2)"""
    clip_grad_norm: Annotated[float, AtLeast(0)] = 0.0
    """maximum L2 norm of the gradient; 0: no clipping"""
    ema_decay: Annotated[float, BelowOne("for instance 0.9999; 0 means no average")] = 0.0
    """decay per step of the exponential moving average (EMA) of the weights, which is evaluated
    too; 0: no EMA"""
    eval_interval_epochs: Annotated[float, AtLeast(0)] = 1.0
    """epochs between evaluations; 0: only at the end of the run, where there always is one"""
    max_nonfinite_steps: Annotated[int, AtLeast(1)] = 10
    """number of consecutive steps with a non-finite gradient before the run stops with an error.
    Such steps do not update the weights"""

    def __post_init__(self) -> None:
        expand_paths(self, "teacher", prefix="train.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, and what a run starts from. A valid checkpoint in output_dir is always used first."""

    interval_epochs: Annotated[float, AtLeast(0)] = 1.0
    """epochs between checkpoints; 0: do not save by epochs. The end of the run and each best
    evaluation are always saved"""
    interval_steps: Annotated[int, AtLeast(0)] = 0
    """steps between checkpoints, in addition to interval_epochs; 0: do not save by steps"""
    keep: Annotated[int, AtLeast(1, "since resuming needs a checkpoint")] = 3
    """number of newest checkpoints to keep, in addition to the best one"""
    resume: str = ""
    """checkpoint to resume from (weights, optimizer, step) if output_dir has none"""
    init_from: str = ""
    """weights to start from, at step 0, if there is nothing to resume: a checkpoint of this
    project, a .pth, .pt or .safetensors file of torchvision, timm or NVIDIA, or
    torchvision:resnet50:IMAGENET1K_V2, which is downloaded"""

    def __post_init__(self) -> None:
        expand_paths(self, "resume", "init_from", prefix="checkpoint.")


@dataclass(frozen=True)
class LogConfig:
    """Console output and experiment tracking."""

    interval_steps: Annotated[int, AtLeast(1)] = 50
    """steps between log lines. Training waits for the device only at these steps"""
    progress_bar: bool = True
    """show a progress bar if the output is a terminal"""
    sinks: tuple[Literal["wandb", "tensorboard", "csv"], ...] = ("wandb",)
    """where the numbers go beside metrics.jsonl: wandb; tensorboard (event files in
    output_dir/tensorboard); csv (output_dir/metrics.csv)"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode. auto: online if there is an API key and a network, otherwise offline;
    online: wait up to 30 s for the server"""
    wandb_project: str = "resnet_dist"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B user or team; null: the default of the account"""
    wandb_name: str | None = None
    """W&B name of the run; null: the name of output_dir"""
    wandb_artifact: bool = False
    """upload the best checkpoint to W&B at the end of the run, as an artifact of type model"""
    sample_images: Annotated[int, AtLeast(0)] = 16
    """number of images of the first batch that are drawn as the network sees them, once per run:
    in output_dir/samples.png, and in the sinks that take pictures; 0: none"""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes (ranks). The launcher (torchrun, SLURM) sets their number."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """device to train on. auto: cuda if available, otherwise cpu"""
    timeout_s: Annotated[float, Above(0)] = 600.0
    """seconds after which a collective operation that waits for another rank fails"""
    threads: Annotated[int, AtLeast(0)] = 0
    """torch threads of each rank on the CPU; 0: CPU cores / ranks of this machine"""


@dataclass(frozen=True)
class RecipeConfig:
    """Facts about a recipe. They change nothing; a run that is far from them prints a warning."""

    global_batch_size: Annotated[int, AtLeast(0)] = 0
    """images per optimizer update of the published training; 0: not known"""
    world_size: Annotated[int, AtLeast(0)] = 0
    """number of ranks of the published training; 0: not known"""
    local_batch_size: Annotated[int, AtLeast(0)] = 0
    """images on each rank in one micro-step; 0: not known"""
    updates: Annotated[int, AtLeast(0)] = 0
    """number of optimizer updates; 0: not known"""
    peak_lr: Annotated[float, AtLeast(0)] = 0.0
    """peak learning rate; 0: not known"""
    top1: Annotated[float | None, Within(0, 100)] = None
    """published top-1 accuracy in percent; null: none"""
    top5: Annotated[float | None, Within(0, 100)] = None
    """published top-5 accuracy in percent; null: none"""
    reference: str = ""
    """paper or repository in short form"""
    source: str = ""
    """paper or repository in full, with section or table"""
    hardware: str = ""
    """hardware that the recipe is meant for"""
    command: str = ""
    """commands that start the training and evaluate its result"""
    expected: str = ""
    """expected result in words"""
    differs: str = ""
    """differences between this recipe and its source"""
