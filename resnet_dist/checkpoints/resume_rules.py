"""Which settings may differ between a checkpoint and the run that goes on from it.

Everything that is not in one of the lists here must be equal: a setting that is added to the
config is refused until somebody decides what a change of it means.
"""

from typing import Any

from resnet_dist.checkpoints.checkpoint_file import Content
from resnet_dist.config import Config, to_dict
from resnet_dist.settings.reading import RENAMED_SETTINGS
from resnet_dist.text import printable

Settings = dict[str, Any]
"""Values by full name of the setting, as "optim.base_lr"."""

# Without influence on the weights: where things are, how fast it goes, what is said. A name of a
# section stands for all its settings.
FREE_TO_CHANGE = frozenset(
    {
        "output_dir",
        "data.data_dir",
        "data.cache_dir",
        "data.cache_gb",
        # What it leaves out is compared by data.fingerprint.
        "data.exclude",
        "data.threads",
        "data.prefetch_batches",
        "data.val_batch_size",
        "data.max_bad_images",
        "data.train_cache",
        "data.val_cache",
        # When the list of images is made anew; the list itself is compared by its fingerprint.
        "data.rescan",
        # Which files are too large or too slow to be used, as data.max_bad_images.
        "data.max_pixels",
        "data.max_file_mb",
        "data.read_timeout_s",
        # Where the teacher is; its weights are compared by train.teacher_sha256.
        "train.teacher",
        "decoder",
        "log",
        "checkpoint",
        "distributed",
        "recipe",
    }
)

# The step keeps its meaning and the weights fit, but the result is another: said with a warning.
CHANGED_WITH_A_WARNING = frozenset(
    {
        "model.zero_init_residual",
        "model.stochastic_depth",
        "model.dropout",
        "model.sync_batch_norm",
        "data.train_crop_size",
        "data.train_crop",
        "data.scale_jitter",
        "data.pad",
        "data.progressive_start_size",
        "data.progressive_epochs",
        "data.val_resize_size",
        "data.val_crop_size",
        "data.val_crops",
        "data.val_scales",
        "data.val_flip",
        "data.train_interpolation",
        "data.val_interpolation",
        "data.crop_scale",
        "data.crop_ratio",
        "data.flip_probability",
        "data.mean",
        "data.std",
        "augment.policy",
        "augment.num_ops",
        "augment.magnitude",
        "augment.magnitude_std",
        "augment.color_jitter",
        "augment.lighting_std",
        "augment.random_erasing",
        "augment.mixup_alpha",
        "augment.cutmix_alpha",
        # A step shows the same images with the same augmentation, in other pairs.
        "augment.mix_block",
        "optim.base_lr",
        "optim.base_batch_size",
        "optim.momentum",
        "optim.nesterov",
        "optim.trust_coefficient",
        "optim.betas",
        "optim.alpha",
        "optim.eps",
        "optim.weight_decay",
        "optim.norm_weight_decay",
        "optim.bias_weight_decay",
        "schedule.kind",
        "schedule.warmup_epochs",
        "schedule.warmup_kind",
        "schedule.warmup_start_factor",
        "schedule.milestones",
        "schedule.gamma",
        "schedule.decay_epochs",
        "schedule.power",
        "schedule.final_lr",
        "train.epochs",
        "train.grad_accum_steps",
        "train.precision",
        "train.tf32",
        "train.deterministic",
        "train.compile",
        "train.compile_mode",
        "train.loss",
        "train.bce_target_threshold",
        "train.label_smoothing",
        "train.distillation_weight",
        "train.distillation_temperature",
        "train.clip_grad_norm",
        "train.ema_decay",
        "train.eval_interval_epochs",
        "train.max_nonfinite_steps",
        "train.max_local_batch",
    }
)

# The values of checkpoints that were written before a setting existed, where these are not the
# default.
_BEFORE_THE_SETTING = {"train.compile": False}

# What a difference of the other settings means, for the message.
_DEFINES_POSITION = frozenset(
    {
        "seed",
        "train.global_batch_size",
        "data.kind",
        "data.num_samples",
        "data.fingerprint",
        "augment.repeats",
    }
)

# Settings of the network that leave what it computes in evaluation as it is.
_NOT_OF_THE_FUNCTION = frozenset(
    {
        "model.num_classes",
        "model.zero_init_residual",
        "model.stochastic_depth",
        "model.dropout",
        "model.sync_batch_norm",
    }
)


def flatten(tree: Settings, prefix: str = "") -> Settings:
    """Nested settings as {"section.key": value}."""
    flat: Settings = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def settings_of(config: Settings) -> Settings:
    """The settings of a stored config by their present names; others have their default."""
    return {**flatten(to_dict(Config())), **_BEFORE_THE_SETTING, **_stored(config)}


def _stored(config: Settings) -> Settings:
    return {RENAMED_SETTINGS.get(key, key): value for key, value in flatten(config).items()}


def check_resumable(saved: Content, facts: Content) -> list[str]:
    """Whether a run with `facts` can go on from the checkpoint content `saved`.

    Returns:
        The settings that differ and may, as sentences.

    Raises:
        ValueError: A setting differs that must not: the step would mean another place in the data,
            the weights would not fit, or nobody has said that it may change.
    """
    before = _compared(saved)
    now = _compared(facts)
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old = before.get(key)
        new = now.get(key)
        if old == new or _is_free(key):
            continue
        difference = f"{key} was {old!r}, now {new!r}"
        if key not in CHANGED_WITH_A_WARNING:
            raise ValueError(printable(_refusal(int(saved["step"]), key, difference)))
        changed.append(printable(difference))
    return changed


def _compared(content: Content) -> Settings:
    settings = settings_of(content["config"])
    settings["data.num_samples"] = content["num_samples"]
    settings["data.fingerprint"] = content["fingerprint"]
    # A checkpoint without it is of a version that knew no teachers.
    settings["train.teacher_sha256"] = content.get("teacher_sha256", "")
    return settings


def _is_free(key: str) -> bool:
    return key in FREE_TO_CHANGE or key.partition(".")[0] in FREE_TO_CHANGE


def _refusal(step: int, key: str, difference: str) -> str:
    if key in _DEFINES_POSITION:
        return (
            f"the checkpoint of step {step} cannot be continued: {difference}, and the step would "
            "mean another place in the data; take another output_dir"
        )
    what = {"model": "another model", "optim": "another optimizer"}.get(key.partition(".")[0])
    return (
        f"the checkpoint of step {step} holds {what or 'the state of another run'}: {difference}; "
        "take another output_dir, or checkpoint.init_from for its weights"
    )


def model_changes(saved: Content, config: Config) -> list[str]:
    """What makes the network of a checkpoint another than that of `config`, but for the classes.

    Its tensors may fit all the same. Empty for a file that is not a checkpoint of ours.
    """
    if not isinstance(saved.get("config"), dict):
        return []
    before = settings_of(saved["config"])
    now = settings_of(to_dict(config))
    return [
        printable(f"{key} was {before.get(key)!r}, now {now.get(key)!r}")
        for key in {**now, **before}
        if key.startswith("model.")
        and key not in _NOT_OF_THE_FUNCTION
        and before.get(key) != now.get(key)
    ]


def stored_config(saved: Content, name: str) -> Settings:
    """The config of a checkpoint as flat settings that this version knows.

    Unknown settings of the network and of the data are refused: what it computes would not be what
    it was trained for. Others are left out.

    Raises:
        ValueError: There is an unknown setting of these sections.
    """
    known = flatten(to_dict(Config()))
    stored = _stored(saved["config"])
    for key in stored:
        if key.partition(".")[0] in ("model", "data") and key not in known:
            raise ValueError(
                f"the checkpoint {printable(name)} has the setting {printable(key)}, which this "
                "version does not know: update it"
            )
    return {key: value for key, value in stored.items() if key in known}
