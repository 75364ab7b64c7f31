"""The Python interface. `import resnet_dist` offers these functions, and imports them when needed.

    import resnet_dist

    config = resnet_dist.Config.from_yaml("quickstart")
    folder = resnet_dist.train(config)
    network = resnet_dist.load(folder)
    print(resnet_dist.evaluate(network)["top1"])
    for prediction in resnet_dist.predict(network, "photos/"):
        print(prediction.path, prediction.best[0])

They call what the command line calls: `resnet-dist train`, `evaluate` and `predict`.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from resnet_dist import run
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_weights
from resnet_dist.checkpoints.saved_network import (
    ForeignWeights,
    SavedNetwork,
    load_network,
    open_weights,
)
from resnet_dist.checkpoints.torchvision_weights import download_weights, is_torchvision_name
from resnet_dist.commands.evaluate import EvaluationRequest, evaluate_network
from resnet_dist.commands.predict import find_images, predict_files
from resnet_dist.config import Config, DataConfig, ModelConfig
from resnet_dist.data.pixels.finish import EXACT_RESIZES, Normalizer, resize_and_crop
from resnet_dist.data.sampling.crops import val_geometry
from resnet_dist.distributed import runtime as distributed
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.sets.classes import Classes
from resnet_dist.models.build import build_model
from resnet_dist.models.weights import load_weights
from resnet_dist.precision import resolve_settings
from resnet_dist.settings.reading import build_config, config_from_dict

Paths = str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class ImagePrediction:
    """What a network says about one image."""

    path: str
    best: tuple[tuple[str, float], ...]
    """class names and their probabilities, the most probable first; empty if there is a problem"""
    problem: str = ""
    """why the image cannot be used; empty if it can"""


class EvaluationTransform:
    """From a PIL image to the input of the network, exactly as in evaluation.

    The shorter side is resized to `data.val_resize_size`, the central square of
    `data.val_crop_size` is taken, and the pixels are normalised: torchvision's Resize, CenterCrop,
    ToTensor and Normalize. Settings that average over several crops are not followed; `predict`
    does.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = replace(data, val_crops="center", val_scales=())
        self.resize = EXACT_RESIZES[data.val_interpolation]
        self.normalize = Normalizer(data, torch.float32, torch.device("cpu"))
        self.normalize.prepare(data.val_crop_size)

    def __call__(self, image: Image) -> torch.Tensor:
        """Prepare one image.

        Args:
            image: A PIL image of any mode and size.

        Returns:
            float32 [3, val_crop_size, val_crop_size].
        """
        rgb = np.array(image.convert("RGB"))
        pixels = torch.from_numpy(rgb)
        height, width = pixels.shape[:2]
        geometry = val_geometry(np.array([height]), np.array([width]), self.data)
        view = geometry.views[0]
        resized_height, resized_width = view.sizes[0].tolist()
        size = (int(resized_height), int(resized_width))
        offset = view.offsets[0].tolist()
        square = resize_and_crop(pixels, size, offset, 0, view.side, self.resize)
        out = torch.empty(1, view.side, view.side, 3)
        self.normalize(square[None], out)
        return out[0].permute(2, 0, 1)


@dataclass(frozen=True)
class Network:
    """A trained network and what is needed to use it; `load` makes it."""

    model: nn.Module
    """in eval mode: images [B, 3, H, W] to logits [B, len(class_names)]"""
    class_names: tuple[str, ...]
    """the classes in the order of the logits"""
    transform: EvaluationTransform
    """from a PIL image to an input of the model"""
    config: Config
    """the settings that the network was trained with"""
    device: torch.device
    saved: SavedNetwork
    """the checkpoint"""


def create_model(
    name: str,
    num_classes: int = 1000,
    weights: str | Path = "",
    **options: Any,
) -> nn.Module:
    """Build a network of `resnet-dist models`.

    Args:
        name: For instance "resnet50".
        num_classes: Number of logits.
        weights: A file with weights (a checkpoint of this project, of torchvision or of timm), or
            weights of torchvision, as "torchvision:resnet50:IMAGENET1K_V2". The classifier keeps
            its random weights if the file has another number of classes. Empty: all are random.
        options: Further settings of the section `model`, for instance zero_init_residual=True.

    Returns:
        The network in training mode: images [B, 3, H, W] to logits [B, num_classes].

    Raises:
        ValueError: There is no such network or option, or the weights are not of this network.
    """
    section: ModelConfig = config_from_dict({"model": {**options, "name": name}}).model
    model = build_model(section, num_classes)
    if weights:
        load_weights(model, _read_weights(str(weights)), str(weights), "weights")
    return model


def _read_weights(name: str) -> dict[str, Any]:
    if is_torchvision_name(name):
        payload = download_weights(name, "weights")
    else:
        payload = read_checkpoint(Path(name))
    return unpack_weights(payload, name)


def load(
    path: str | Path, device: str = "auto", changes: Mapping[str, Any] | None = None
) -> Network:
    """Load a trained network.

    Of the folder of a run, the best checkpoint is taken; of a checkpoint, the averaged weights if
    it has any.

    Args:
        path: A run's `output_dir`, a file of its folder checkpoints/, a .pth or .safetensors file
            of another program, or weights of torchvision, as "torchvision:resnet50:IMAGENET1K_V2".
        device: "cpu", "cuda" or "auto".
        changes: Settings to change, as {"model.name": "resnet50"}, which a file of another program
            needs.

    Raises:
        ValueError: There is no such file, it is damaged, or it does not fit the network.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    opened = open_weights(str(path))
    config = build_config({**opened.settings, **(changes or {})})
    if isinstance(opened, ForeignWeights):
        saved = opened.fit(config)
    else:
        saved = opened
        if config.model != build_config(saved.settings).model:
            raise ValueError(
                "changes: the settings of model are the checkpoint's and cannot be changed"
            )
    model, _ = load_network(saved, config, place)
    transform = EvaluationTransform(config.data)
    return Network(model, tuple(saved.names_or(())), transform, config, place, saved)


def predict(network: Network, images: Paths, top: int = 5) -> list[ImagePrediction]:
    """The most probable classes of images, seen exactly as in evaluation.

    Args:
        network: What `load` returns.
        images: Files, or folders with images in or below them.
        top: Number of classes for each image.

    Raises:
        ValueError: There is no image at all. An image that cannot be decoded has its `problem` in
            its prediction.
    """
    if isinstance(images, (str, Path)):
        images = [images]
    words = [str(path) for path in images]
    files = find_images(words)
    # One process needs no process group.
    runtime = Runtime(0, 0, 1, 1, network.device, None)
    config = resolve_settings(network.config, network.device)
    predictions = []
    for found in predict_files(network.model, files, config, runtime, top):
        best = []
        if not found.problem:
            for number, probability in found.best:
                class_name = network.class_names[number]
                best.append((class_name, probability))
        prediction = ImagePrediction(found.path, tuple(best), found.problem)
        predictions.append(prediction)
    return predictions


def evaluate(network: Network, data_dir: str | Path = "", classes: Classes = "") -> dict[str, Any]:
    """Evaluate the network on the validation set that it was trained with, or on another one.

    Under torchrun, call it in every process: each evaluates its share. The weights are those of the
    checkpoint: changes of `network.model` have no effect.

    Args:
        network: What `load` returns.
        data_dir: A folder with val/ or with class folders; empty: the one of the training.
        classes: For a data set with part of the classes: "present" lets only its classes compete,
            "all" keeps the logits of the others; empty: it is refused.

    Returns:
        "top1" and "top5" in percent, "loss", and the counts behind them ("num", "correct1", ...).

    Raises:
        ValueError: The data does not fit the network.
    """
    config = network.config
    request = EvaluationRequest(str(data_dir), classes)
    section = config.distributed
    runtime = distributed.start(network.device.type, section.timeout_s, section.threads)
    try:
        config = resolve_settings(config, runtime.device)
        with tempfile.TemporaryDirectory() as scratch:
            results = evaluate_network(network.saved, config, runtime, scratch, request)
    finally:
        distributed.stop(runtime)
    counts: dict[str, Any] = results["ema" if "ema" in results else "model"]
    return counts


def train(config: Config) -> Path:
    """Train, in this process or under torchrun (call it in every process). It resumes by itself.

    Returns:
        The folder of the run, for `load`, once its files are written.

    Raises:
        RuntimeError: The training failed, or was stopped by a signal. What went wrong has been
            printed.
    """
    code = run_process(config, _train_and_wait, resolve_auto=False)
    if code:
        raise RuntimeError(
            f"the training ended with exit code {code}: see its last messages. The same call "
            f"resumes from the checkpoints in {config.output_dir}"
        )
    return Path(config.output_dir)


def _train_and_wait(config: Config, runtime: Runtime) -> int:
    """Train, and wait for the main process, which writes the last checkpoint."""
    code = run.train(config, runtime)
    if code == 0:
        runtime.barrier()
    return code
