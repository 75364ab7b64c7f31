"""The network of a checkpoint, as the commands evaluate, predict and export take it."""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from resnet_dist.checkpoint_file import (
    NEEDED_TO_EVALUATE,
    Content,
    read_checkpoint,
    unpack_checkpoint,
)
from resnet_dist.config import Config
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.models.weights import load_exactly
from resnet_dist.resume_rules import Settings, stored_config
from resnet_dist.run_folder import find_checkpoint


@dataclass(frozen=True)
class SavedNetwork:
    """A checkpoint that was read, checked, and has all parts that a network needs."""

    path: Path
    content: Content
    settings: Settings
    """the config of its run, by full name of the setting, as far as this version knows it"""
    sha256: str
    """digest of the file, as sha256sum prints it"""

    @property
    def class_names(self) -> list[str]:
        """The classes that it was trained on, in the order of its outputs."""
        names: list[str] = self.content["class_names"]
        return names

    @property
    def step(self) -> int:
        """The number of updates that it was trained for."""
        step: int = self.content["step"]
        return step


def open_network(path: Path) -> SavedNetwork:
    """Read the checkpoint at `path`, or the best one of the run's folder `path`.

    What is remarkable (damaged files that are passed over, a file without a digest) is printed to
    standard error by the main process.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or parts of it are missing.
    """
    chosen = find_checkpoint(path, _warn)
    payload = read_checkpoint(chosen, _warn)
    content = unpack_checkpoint(payload, str(chosen), NEEDED_TO_EVALUATE)
    settings = stored_config(content, str(chosen))
    return SavedNetwork(chosen, content, settings, hashlib.sha256(payload).hexdigest())


def build_network(saved: SavedNetwork, config: Config, device: torch.device) -> nn.Module:
    """The network of a checkpoint in eval mode, with fresh weights: see `load_into`."""
    model = build_model(config.model, len(saved.class_names))
    if config.model.sync_batch_norm:
        model = convert_sync_batch_norm(model)
    placed: nn.Module = model.to(  # type: ignore[call-overload]
        device=device, memory_format=torch.channels_last
    )
    return placed.eval()


def load_into(model: nn.Module, saved: SavedNetwork, kind: str) -> None:
    """Load the weights of a checkpoint: `kind` "ema" for the averaged ones, or "model".

    Raises ValueError if they do not fit the network.
    """
    load_exactly(model, saved.content[kind], f"the checkpoint {saved.path}")


def load_network(
    saved: SavedNetwork, config: Config, device: torch.device, raw: bool = False
) -> tuple[nn.Module, str]:
    """The network of a checkpoint in eval mode, and which weights it has.

    These are the averaged ones ("ema") where there are any and `raw` is false, else "model".

    Raises:
        ValueError: The weights do not fit the network, or this is one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("this command runs in one process: start it without torchrun")
    model = build_network(saved, config, device)
    kind = "ema" if saved.content["ema"] and not raw else "model"
    load_into(model, saved, kind)
    return model, kind


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
