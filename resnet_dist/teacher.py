"""Distillation: a trained network, the teacher, whose predictions are learned.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Beyer et al. 2021, "Knowledge
distillation: A good teacher is patient and consistent". The teacher sees the pixels that the
trained network sees, after augmentation, mixup and CutMix. It is in evaluation mode and has no
gradient; it is not part of the state of training, and checkpoints hold only its digest.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from resnet_dist.checkpoints.saved_network import (
    SavedNetwork,
    load_network,
    open_weights,
    preferred_kind,
)
from resnet_dist.checkpoints.torchvision_weights import describe_weights, is_torchvision_name
from resnet_dist.config import Config, ModelConfig, TrainConfig
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.forward import all_logits, at_least_fp32
from resnet_dist.losses import LossFn, LossFor, build_loss, distillation_loss
from resnet_dist.models.zoo import ZOO
from resnet_dist.precision import Precision
from resnet_dist.settings.reading import build_config
from resnet_dist.text import printable

_KEY = "train.teacher"


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run, on the device of this rank."""

    network: nn.Module
    """in evaluation mode; images [B, 3, H, W] to logits [B, num_classes]"""
    sha256: str
    """digest of the file of its weights"""
    description: str
    """what it is and where it is from"""
    warnings: tuple[str, ...]
    """how its training differs from this run in what it sees"""


def load_teacher(config: Config, class_names: Sequence[str], runtime: Runtime) -> Teacher | None:
    """Load the network that `train.teacher` names. Call it on every rank.

    Only the main process reads the file or downloads it. It sends the weights to the other ranks.

    Args:
        config: The config of the run.
        class_names: The classes of the data.
        runtime: The ranks.

    Returns:
        None if `train.teacher` is empty.

    Raises:
        ValueError: On every rank, if there are no such weights, or if they do not fit the data.
    """
    if not config.train.teacher:
        return None
    payload = runtime.bytes_from_main(lambda: _pack(read_teacher(config)))
    saved = _unpack(payload)
    name = printable(config.train.teacher)
    if saved.num_classes != len(class_names):
        raise ValueError(
            f"{_KEY} is {name!r}, which has {saved.num_classes} classes, and the data has "
            f"{len(class_names)}: take a teacher that was trained on these classes"
        )
    own = build_config(saved.settings)
    _check_size(own.model.name, config)
    # In evaluation mode it takes no statistics of the batch.
    model_config = replace(own.model, sync_batch_norm=False)
    network, _ = load_network(saved, replace(own, model=model_config), runtime.device)
    network.requires_grad_(False)
    return Teacher(
        network=network,
        sha256=saved.sha256,
        description=f"{own.model.name} of {printable(saved.path)} (sha256 {saved.sha256[:12]})",
        warnings=tuple(_differences(saved, own, config, class_names)),
    )


def read_teacher(config: Config) -> SavedNetwork:
    """Read the weights that `train.teacher` names.

    Args:
        config: The config of the run. Its pixels count for weights that do not say what theirs are.

    Raises:
        ValueError: There are no such weights, or nothing says which network they are of.
    """
    train = config.train
    _check_existence(train)
    opened = open_weights(train.teacher, _KEY)
    settings = {"data.mean": config.data.mean, "data.std": config.data.std, **opened.settings}
    model_name = settings["model.name"]
    if train.teacher_model and model_name not in ("", train.teacher_model):
        raise ValueError(
            f"train.teacher_model is {train.teacher_model!r}, but {printable(train.teacher)} is a "
            f"{model_name}: leave train.teacher_model empty"
        )
    if isinstance(opened, SavedNetwork):
        return opened
    settings["model.name"] = model_name or train.teacher_model
    if not settings["model.name"]:
        raise ValueError(
            f"{_KEY} is {train.teacher!r}: the file does not say which network it is: set "
            "train.teacher_model, for instance resnet50 (`resnet-dist models` lists all names)"
        )
    return opened.fit(build_config(settings))


def find_teacher(config: Config) -> ModelConfig | None:
    """Which network the teacher is. Nothing is downloaded, but a file is read.

    Args:
        config: The config of the run.

    Returns:
        Its settings, with the number of its classes; None if `train.teacher` is empty.

    Raises:
        ValueError: There are no such weights, or nothing says which network they are of.
    """
    name = config.train.teacher
    if not name:
        return None
    if is_torchvision_name(name):
        published = describe_weights(name, _KEY)
        num_classes = len(published.categories) or None
        return ModelConfig(name=published.model, num_classes=num_classes)
    saved = read_teacher(config)
    own = build_config(saved.settings)
    return replace(own.model, num_classes=saved.num_classes)


def build_loss_for(train: TrainConfig, precision: Precision, teacher: Teacher | None) -> LossFor:
    """Build the loss of a run: that of the labels, that of the teacher's predictions, or a mean.

    Args:
        train: The `train` section of the config.
        precision: The precision of the run, in which the teacher computes too.
        teacher: None for a training without distillation.
    """
    label_loss = build_loss(train)

    def without_teacher(images: torch.Tensor) -> LossFn:
        return label_loss

    if teacher is None:
        return without_teacher
    network = teacher.network
    weight = train.distillation_weight
    temperature = train.distillation_temperature

    def with_teacher(images: torch.Tensor) -> LossFn:
        with torch.no_grad(), precision.autocast():
            outputs = all_logits(network(images))
        teacher_logits = at_least_fp32(outputs[0])

        def loss_fn(
            logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor | None
        ) -> torch.Tensor:
            of_labels = label_loss(logits, labels, shares)
            of_teacher = distillation_loss(logits, teacher_logits, temperature)
            return torch.lerp(of_labels, of_teacher, weight)

        return loss_fn

    return with_teacher


def _pack(saved: SavedNetwork) -> bytes:
    """What the other ranks need to build the teacher, as a file of plain types."""
    content = {
        "path": str(saved.path),
        "weights": saved.content[preferred_kind(saved)],
        "step": saved.step,
        "settings": saved.settings,
        "sha256": saved.sha256,
        "class_names": saved.class_names,
        "num_classes": saved.num_classes,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpack(payload: bytes) -> SavedNetwork:
    """The inverse of `_pack`."""
    content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return SavedNetwork(
        path=Path(content["path"]),
        content={"model": content["weights"], "ema": None, "step": content["step"]},
        settings=content["settings"],
        sha256=content["sha256"],
        class_names=content["class_names"],
        num_classes=content["num_classes"],
    )


def _check_existence(train: TrainConfig) -> None:
    """Raise ValueError if `train.teacher` names a file or folder that does not exist."""
    if is_torchvision_name(train.teacher) or Path(train.teacher).exists():
        return
    raise ValueError(
        f"{_KEY} is {printable(train.teacher)!r}, which does not exist: name a run folder, a "
        "checkpoint, a .pth or .safetensors file, or torchvision:resnet152:IMAGENET1K_V2"
    )


def _check_size(name: str, config: Config) -> None:
    """Raise ValueError if the training images are too small for the teacher."""
    data = config.data
    side = data.progressive_start_size or data.train_crop_size
    if name in ZOO and side < ZOO[name].min_size:
        raise ValueError(
            f"{_KEY} is {printable(config.train.teacher)!r}: a {name} takes images of "
            f"{ZOO[name].min_size} pixels or more, and training begins with {side}; take another "
            "teacher, or larger images (data.train_crop_size, data.progressive_start_size)"
        )


def _differences(
    saved: SavedNetwork, own: Config, config: Config, class_names: Sequence[str]
) -> list[str]:
    """How the training of the teacher differs from this run in what it sees, as sentences."""
    found = []
    for key in ("mean", "std"):
        theirs = getattr(own.data, key)
        ours = getattr(config.data, key)
        if theirs != ours:
            found.append(
                f"the teacher was trained with data.{key} {theirs}, and sees images of {ours}: set "
                f"data.{key} to its values"
            )
    if saved.class_names and saved.class_names != list(class_names):
        found.append(
            "the teacher has the same number of classes as the data, but with other names: the "
            "order must be the same"
        )
    return found
