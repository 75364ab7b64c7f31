"""A network with its weights, as the commands evaluate, predict and export take it.

The weights come from a checkpoint of ours, a file of another program, or torchvision.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint_file import (
    NEEDED_TO_EVALUATE,
    Content,
    read_checkpoint,
    read_metadata,
    read_step,
    unpack_checkpoint,
    unpack_weights,
)
from resnet_dist.checkpoints.resume_rules import Settings, flatten, stored_config
from resnet_dist.checkpoints.run_folder import find_checkpoint
from resnet_dist.checkpoints.torchvision_weights import (
    PublishedWeights,
    describe_weights,
    download_weights,
    imagenet_words,
    is_torchvision_name,
)
from resnet_dist.config import Config, to_dict
from resnet_dist.models.build import (
    TWO_PADDED_SHORTCUTS,
    build_model,
    build_on_meta,
    pads_shortcuts,
)
from resnet_dist.models.class_names import assumed_names
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.models.weights import (
    count_outputs,
    describe,
    find_weights,
    load_exactly,
    load_weights,
    refuse_non_finite,
)
from resnet_dist.text import printable

_OPTION = "--weights"


@dataclass(frozen=True)
class SavedNetwork:
    """Weights that were read, checked, and have all parts that a network needs."""

    path: Path
    content: Content
    """"model" and "ema", the tensors by name, and "step"; all parts of a checkpoint of ours"""
    settings: Settings
    """the config of its run, by full name of the setting, as far as this version knows it"""
    sha256: str
    """digest of the file, as sha256sum prints it"""
    class_names: list[str]
    """the classes in the order of the outputs; empty if nothing names them"""
    num_classes: int
    """number of outputs"""
    is_foreign: bool = False
    """whether they are of another program, so that there is no step"""
    reported_top1: float | None = None
    """the accuracy in percent that the file or its publisher reports; None for none"""
    remarks: tuple[str, ...] = ()
    """sentences for the user about what was assumed"""

    @property
    def step(self) -> int:
        """The number of updates that it was trained for; 0 for weights of another program."""
        step: int = self.content["step"]
        return step

    @property
    def origin(self) -> str:
        """Where the weights are from, for messages: "step 12", or the name of the file."""
        if self.is_foreign:
            return printable(self.path.name)
        return f"step {self.step}"

    def names_or(self, names: tuple[str, ...]) -> list[str]:
        """The class names; if nothing names the classes, those of a data set, or numbers.

        Args:
            names: Class names of the data set. They are taken if there is one for each output.
        """
        if self.class_names:
            return self.class_names
        if len(names) == self.num_classes:
            return list(names)
        return [f"class {number}" for number in range(self.num_classes)]


@dataclass(frozen=True)
class ForeignWeights:
    """Weights of another program. Which network they belong to, only the user can say."""

    name: str
    """the file, or the name of torchvision's weights"""
    payload: bytes = field(repr=False)
    weights: dict[str, torch.Tensor] = field(repr=False)
    published: PublishedWeights | None
    """what torchvision says about its weights; None for a file"""
    metadata: dict[str, str]
    """the texts in a .safetensors file"""
    key: str = _OPTION
    """the option or setting that names them, for error messages"""

    @property
    def settings(self) -> Settings:
        """What the weights say about their network and their images, as settings."""
        if self.published is not None:
            return {"model.name": self.published.model, **self.published.pixels}
        if "resnet_dist" in self.metadata:
            return _settings_of_export(self.metadata)
        # No network is named so: the user has to name it.
        return {"model.name": ""}

    def fit(self, config: Config) -> SavedNetwork:
        """Give the tensors the names and the order of a network.

        Args:
            config: The settings: `model` says what the network is.

        Raises:
            ValueError: They do not fit the network, or `model.name` is empty.
        """
        quoted = f"{self.key} is {self.name!r}"
        if not config.model.name:
            raise ValueError(
                f"{quoted}: the file does not say which network it is: add --model.name, for "
                "instance --model.name resnet50 (`resnet-dist models` lists all names)"
            )
        num_classes = self._count_classes(config, quoted)
        model = build_model(config.model, num_classes)
        rows, fits = load_weights(model, self.weights, self.name, self.key)
        if not fits:
            raise ValueError(
                f"{quoted}: not all tensors fit {config.model.name}: choose the model.name and "
                f"options that they were made with\n{describe(rows)}"
            )
        names = self._class_names(num_classes)
        remarks = [f"{printable(self.name)}: {self._describe_pixels(config)}"]
        if rows["renamed"]:
            remarks.append(f"renamed tensors: {printable(_first_and_last(rows['renamed']))}")
        if self.published is None and pads_shortcuts(config.model):
            remarks.append(f"{printable(self.name)}: {TWO_PADDED_SHORTCUTS}")
        if self.published is None and names and "class_names" not in self.metadata:
            remarks.append(
                f"{printable(self.name)} does not name its {num_classes} classes: they are taken "
                "for ImageNet's, in the order of their WordNet ids"
            )
        return SavedNetwork(
            path=Path(self.name),
            content={"model": model.state_dict(), "ema": None, "step": 0},
            settings=flatten(to_dict(config)),
            sha256=hashlib.sha256(self.payload).hexdigest(),
            class_names=names,
            num_classes=num_classes,
            is_foreign=True,
            reported_top1=self.published.top1 if self.published else None,
            remarks=tuple(remarks),
        )

    def _count_classes(self, config: Config, quoted: str) -> int:
        """The number of outputs. Raises ValueError if the file has no classifier."""
        model = build_on_meta(config.model)
        num_classes = count_outputs(model, self.weights)
        if not num_classes:
            # The error that names the tensors.
            load_weights(model, self.weights, self.name, self.key)
            raise ValueError(
                f"{quoted}: it has no classifier of {config.model.name}; take weights that were "
                "trained for classification"
            )
        wanted = config.model.num_classes
        if wanted not in (None, num_classes):
            raise ValueError(
                f"model.num_classes is {wanted}, but {printable(self.name)} has {num_classes} "
                "classes: leave it out"
            )
        return num_classes

    def _class_names(self, num_classes: int) -> list[str]:
        """The names of the classes, in the order of the outputs; empty if nothing tells them."""
        if "class_names" in self.metadata:
            names = json.loads(self.metadata["class_names"])
            if isinstance(names, list) and len(names) == num_classes:
                return [str(name) for name in names]
        categories = self.published.categories if self.published else ()
        if categories and list(categories) != imagenet_words():
            return list(categories)
        # ImageNet's words are not unique (two classes are a crane), but its WordNet ids are.
        return assumed_names(num_classes)

    def _describe_pixels(self, config: Config) -> str:
        """How images are prepared, and where that is from."""
        data = config.data
        source = "from the settings of data"
        if self.published is not None or "resnet_dist" in self.metadata:
            source = "from the weights' metadata and the settings of data"
        mean = ", ".join(f"{value:g}" for value in data.mean)
        std = ", ".join(f"{value:g}" for value in data.std)
        return (
            f"resize {data.val_resize_size}, crop {data.val_crop_size}, {data.val_interpolation}, "
            f"mean {mean}, std {std} ({source})"
        )


def _settings_of_export(metadata: dict[str, str]) -> Settings:
    """The settings that `resnet-dist export --to safetensors` has written into a file."""
    settings: Settings = {"model.name": metadata.get("model", "")}
    for key, value in json.loads(metadata.get("model_options", "{}")).items():
        settings[f"model.{key}"] = value
    for key in ("val_resize_size", "val_crop_size", "val_interpolation", "mean", "std"):
        if key in metadata:
            value = json.loads(metadata[key])
            settings[f"data.{key}"] = tuple(value) if isinstance(value, list) else value
    return settings


def _first_and_last(names: list[str]) -> str:
    """The names of a list: all of up to three, else the first, their number and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, ... {len(names) - 2} more ..., {names[-1]}"


def open_weights(name: str, key: str = _OPTION) -> SavedNetwork | ForeignWeights:
    """Read weights of any kind.

    What is remarkable (damaged files that are passed over, a file without a digest) is printed to
    standard error by the main process.

    Args:
        name: A checkpoint of ours, the folder of a run, a file of another program, or
            `torchvision:<model>:<weights>`.
        key: The option or setting with the name, for error messages.

    Raises:
        ValueError: There is no such file, it is damaged, or it has no weights.
    """
    if is_torchvision_name(name):
        published = describe_weights(name, key)
        payload = download_weights(name, key)
        _, weights = find_weights(unpack_weights(payload, name))
        return ForeignWeights(name, payload, weights, published, {}, key)
    path = Path(name)
    # Only our checkpoints have a step at their end.
    if path.is_dir() or read_step(path) is not None:
        return open_network(path)
    payload = read_checkpoint(path)
    content = unpack_weights(payload, name)
    if "format" in content:
        # A checkpoint of an earlier version.
        return open_network(path)
    _, weights = find_weights(content)
    if not weights:
        raise ValueError(
            f"{key} is {printable(name)!r}: it has no tensors; name a checkpoint of resnet_dist, "
            "the folder of a run, a .pth or .safetensors file with a state dict, or "
            "torchvision:resnet50:IMAGENET1K_V2"
        )
    return ForeignWeights(name, payload, weights, None, read_metadata(payload, name), key)


def open_network(path: Path) -> SavedNetwork:
    """Read the checkpoint at `path`, or the best one of the run's folder `path`.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or parts of it are missing.
    """
    chosen = find_checkpoint(path, _warn)
    payload = read_checkpoint(chosen, _warn)
    content = unpack_checkpoint(payload, str(chosen), NEEDED_TO_EVALUATE)
    settings = stored_config(content, str(chosen))
    names: list[str] = content["class_names"]
    best = content.get("best_top1", -1.0)
    return SavedNetwork(
        path=chosen,
        content=content,
        settings=settings,
        sha256=hashlib.sha256(payload).hexdigest(),
        class_names=names,
        num_classes=len(names),
        reported_top1=best if best >= 0 else None,
    )


def build_network(saved: SavedNetwork, config: Config, device: torch.device) -> nn.Module:
    """The network of a checkpoint in eval mode, with fresh weights: see `load_into`."""
    model = build_model(config.model, saved.num_classes)
    if config.model.sync_batch_norm:
        model = convert_sync_batch_norm(model)
    placed: nn.Module = model.to(  # type: ignore[call-overload]
        device=device, memory_format=torch.channels_last
    )
    return placed.eval()


def load_into(model: nn.Module, saved: SavedNetwork, kind: str) -> None:
    """Load the weights of a checkpoint: `kind` "ema" for the averaged ones, or "model".

    Raises ValueError if they do not fit the network, or if some are not finite.
    """
    title = f"the checkpoint {printable(saved.path)}"
    refuse_non_finite(saved.content[kind], title)
    load_exactly(model, saved.content[kind], title)


def preferred_kind(saved: SavedNetwork, raw: bool = False) -> str:
    """Which weights are used: the averaged ones ("ema") if there are any, else "model".

    Args:
        saved: The checkpoint.
        raw: Use "model" in any case.
    """
    if saved.content["ema"] and not raw:
        return "ema"
    return "model"


def refuse_several_processes() -> None:
    """Raise ValueError if this process is one of several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("this command runs in one process: start it without torchrun")


def load_network(
    saved: SavedNetwork, config: Config, device: torch.device, raw: bool = False
) -> tuple[nn.Module, str]:
    """The network of a checkpoint in eval mode, and which weights it has: `preferred_kind`.

    Raises:
        ValueError: The weights do not fit the network.
    """
    model = build_network(saved, config, device)
    kind = preferred_kind(saved, raw)
    load_into(model, saved, kind)
    return model, kind


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
