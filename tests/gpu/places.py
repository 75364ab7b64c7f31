"""Where a check runs and how large it is, and small helpers of all checks.

The checks prove what runs on a GPU. They take the device, so that the CPU tests run them as well,
at a small size: a mistake in a check is found before a GPU is at hand.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

from resnet_dist.config import Config, DataConfig, ModelConfig, TrainConfig  # noqa: E402
from resnet_dist.distributed import runtime as distributed  # noqa: E402
from resnet_dist.distributed.runtime import Runtime  # noqa: E402
from resnet_dist.precision import resolve_settings  # noqa: E402


@dataclass(frozen=True)
class Place:
    """The device and the size of a check."""

    device: torch.device
    is_full: bool
    """false: small enough for a CPU"""

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def size(self, full: int, small: int) -> int:
        """`full`, or `small` for a small check."""
        return full if self.is_full else small


class SkippedCheckError(Exception):
    """A check cannot run here; the message says why."""


@contextlib.contextmanager
def single_rank(place: Place) -> Iterator[Runtime]:
    """A process group of this process alone: NCCL on a GPU, gloo on a CPU."""
    runtime = distributed.start(place.device.type, 600.0, 1)
    try:
        yield runtime
    finally:
        distributed.stop(runtime)


def training_config(place: Place, folder: Path, precision: str = "auto") -> Config:
    """A training on random pixels: ResNet-50 at 224 pixels, or small, ResNet-20 at 16."""
    batch_size = place.size(64, 4)
    config = Config(
        output_dir=str(folder),
        model=ModelConfig(name="resnet50" if place.is_full else "resnet20"),
        data=DataConfig(
            kind="synthetic",
            train_crop_size=place.size(224, 16),
            synthetic_images=4 * batch_size,
            synthetic_classes=place.size(1000, 10),
        ),
        train=TrainConfig(global_batch_size=batch_size, precision=precision),
    )
    return resolve_settings(config, place.device)


def with_compile(config: Config, is_on: bool) -> Config:
    """The config with `train.compile` set."""
    return replace(config, train=replace(config.train, compile=is_on))


def eager_and_compiled(place: Place, config: Config) -> dict[str, Config]:
    """What is measured, by name: the config, which is eager, and on a GPU also a compiled one."""
    variants = {"eager": config}
    if place.is_cuda:
        variants["compiled"] = with_compile(config, True)
    return variants


def of_network(place: Place, folder: Path, name: str, side: int, batch_size: int) -> Config:
    """A training on random pixels, eager."""
    config = training_config(place, folder)
    config = replace(
        config,
        model=replace(config.model, name=name),
        data=replace(config.data, train_crop_size=side, synthetic_images=2 * batch_size),
        train=replace(config.train, global_batch_size=batch_size),
    )
    return with_compile(config, False)


def resnet50(place: Place, folder: Path) -> Config:
    """ResNet-50 at 224 pixels with batch 256, or something small."""
    if place.is_full:
        return of_network(place, folder, "resnet50", 224, 256)
    return of_network(place, folder, "resnet18", 32, 4)


def synchronize(place: Place) -> None:
    """Wait for the GPU."""
    if place.is_cuda:
        torch.cuda.synchronize(place.device)
