"""Weights that torchvision publishes: the file, and what their metadata says about their use.

They are named `torchvision:<model>:<weights>`, as "torchvision:resnet50:IMAGENET1K_V2".
"""

import contextlib
import fcntl
import hashlib
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PREFIX = "torchvision:"
"""What the names of torchvision's weights begin with."""

# Seconds without an answer after which a download fails. By default it would wait for ever.
_DOWNLOAD_TIMEOUT = 60.0

# Torchvision builds these with `transform_input` when they get their published weights: the network
# takes back the normalisation of the transform, so that it sees pixels in [-1, 1].
_TAKES_BACK_NORMALISATION = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class PublishedWeights:
    """What the metadata of torchvision's weights says about their use."""

    model: str
    """model.name"""
    categories: tuple[str, ...]
    """the words of the classes, in the order of the logits; empty if the metadata has none"""
    top1: float | None
    """published top-1 on ImageNet in percent; None if the metadata has none"""
    pixels: dict[str, Any]
    """settings of the section data: resize, crop, interpolation, mean and std"""


def is_torchvision_name(name: str) -> bool:
    """Whether `name` stands for weights of torchvision, and not for a file."""
    return name.startswith(PREFIX)


def describe_weights(name: str, key: str) -> PublishedWeights:
    """Read the metadata of torchvision's weights. Nothing is downloaded.

    Args:
        name: `torchvision:<model>:<weights>`.
        key: The setting or option with the name, for error messages.

    Raises:
        ValueError: There are no such weights, or they are not for the classification of images.
    """
    weights = _find_weights(name, key)
    model = name.split(":")[1]
    transform = weights.transforms()
    try:
        pixels = {
            "data.val_resize_size": int(transform.resize_size[0]),
            "data.val_crop_size": int(transform.crop_size[0]),
            "data.val_interpolation": str(transform.interpolation.value),
            "data.mean": tuple(transform.mean),
            "data.std": tuple(transform.std),
        }
    except AttributeError as problem:
        raise ValueError(
            f"{key} is {name!r}: these weights do not classify images ({problem})"
        ) from problem
    if model in _TAKES_BACK_NORMALISATION:
        pixels["data.mean"] = (0.5, 0.5, 0.5)
        pixels["data.std"] = (0.5, 0.5, 0.5)
    metrics = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    categories = weights.meta.get("categories") or ()
    return PublishedWeights(model, tuple(categories), metrics.get("acc@1"), pixels)


def imagenet_words() -> list[str]:
    """The words of ImageNet's 1,000 classes, in the order of their WordNet ids: "tench", ..."""
    from torchvision.models import get_model_weights

    words: list[str] = get_model_weights("resnet50").IMAGENET1K_V1.meta["categories"]
    return words


def download_weights(name: str, key: str = "checkpoint.init_from") -> bytes:
    """Download weights of torchvision, or read them from the cache of torch.hub.

    Downloaded weights are kept in that cache. Of several processes of a machine, one downloads.

    Args:
        name: `torchvision:<model>:<weights>`, as "torchvision:resnet50:IMAGENET1K_V2".
        key: The setting or option with the name, for error messages.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: The name is unknown, the download fails, or the SHA-256 of the file does not
            begin with the digits in its name.
    """
    weights = _find_weights(name, key)
    file_name = weights.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", file_name)
    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        # torch prints what it downloads to standard output, which may be read by a program.
        with _alone(path), contextlib.redirect_stdout(sys.stderr):
            weights.get_state_dict(
                model_dir=str(path.parent),
                progress=sys.stderr.isatty(),
                check_hash=True,
                weights_only=True,
                map_location="cpu",
            )
        payload = path.read_bytes()
    # The network, the disk and the file raise many types.
    except Exception as problem:
        raise ValueError(
            f"{key} is {name!r}: {weights.url} could not be had ({problem}). Where "
            f"there is no network, fetch it elsewhere, and put it to {path} or give its path as "
            f"{key}"
        ) from problem
    finally:
        socket.setdefaulttimeout(old_timeout)
    _check_digits_in_name(path, payload)
    return payload


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine downloads the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        yield
        return
    with open(path.with_name(f"{path.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_digits_in_name(path: Path, payload: bytes) -> None:
    """Compare a file with the first digits of its SHA-256, as in resnet50-11ad3fa6.pth.

    Raises:
        ValueError: They differ.
    """
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if digits is None:
        return
    digest = hashlib.sha256(payload).hexdigest()
    if not digest.startswith(digits[1]):
        raise ValueError(
            f"{path} is damaged: its SHA-256 does not begin with {digits[1]}; delete it"
        )


def _find_weights(name: str, key: str) -> Any:  # noqa: ANN401  torchvision has no types
    """Look up `torchvision:<model>:<weights>` in the catalogue of torchvision.

    Raises:
        ValueError: There are no such weights.
    """
    from torchvision.models import get_model_weights, list_models

    model, _, kind = name.removeprefix(PREFIX).partition(":")
    kinds = {}
    if model in list_models():
        kinds = get_model_weights(model).__members__
    if kind not in kinds:
        known = [f"{PREFIX}{model}:{one}" for one in kinds]
        choices = ", ".join(known) or "those of its own models"
        raise ValueError(f"{key} is {name!r}: torchvision has no such weights, only {choices}")
    return kinds[kind]
