"""The arithmetic of the forward and backward pass: `train.precision` on this hardware."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from resnet_dist.config import Config, TrainConfig

PrecisionName = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_CPU_FLAGS_OF_FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's names of the instructions: two of x86-64, and one of 64-bit Arm."""


@dataclass(frozen=True)
class Precision:
    """The precision of the forward pass on one device: a key of `DTYPES`, never `auto`."""

    name: str
    device: torch.device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of images, activations and of the products in convolutions."""
        return DTYPES[self.name]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute what is inside in this precision, where autocast considers it safe."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """The scaler of the loss, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def build_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The precision of `train.precision` on `device`."""
    name = resolve_precision(config.precision, device)
    return Precision(name, device)


def resolve_settings(
    config: Config, device: torch.device, saved: dict[str, Any] | None = None
) -> Config:
    """The config with the value that `auto` stands for in `train.precision` and `train.compile`.

    `saved` is the config in the checkpoint that the run resumes from. Its values are kept: a run
    that is requeued on another kind of node must not change its arithmetic. A value that the user
    names is taken as it is.
    """
    train = config.train
    saved_train = {} if saved is None else saved.get("train", {})
    if train.precision == "auto":
        precision = resolve_precision(saved_train.get("precision", "auto"), device)
        train = replace(train, precision=precision)
    if train.compile == "auto":
        compiles = device.type == "cuda"
        if saved is not None:
            # A checkpoint without the setting is of a version that did not compile.
            compiles = saved_train.get("compile", False) is True
        train = replace(train, compile=compiles)
    return replace(config, train=train)


def set_arithmetic(config: TrainConfig, device: torch.device) -> None:
    """Set PyTorch's process-wide switches for `train.tf32` and `train.deterministic`.

    On a CPU both change nothing. With `deterministic`, cuBLAS needs a fixed workspace, unless the
    user has set one (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        # Filling new memory with NaN only serves to find bugs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def resolve_precision(
    setting: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device
) -> PrecisionName:
    """The precision that `setting` stands for on `device`.

    `auto` is the fastest precision that the hardware computes natively: bf16 where it has it, else
    fp16 on a GPU and fp32 on a CPU.
    """
    if setting != "auto":
        return setting
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The type that `train.precision auto` computes in on `device`."""
    return DTYPES[resolve_precision("auto", device)]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16.

    Without them PyTorch emulates it, several times slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _CPU_FLAGS_OF_FAST_BF16.isdisjoint(cpu_flags())


def cpu_flags() -> set[str]:
    """The instruction sets of this machine's CPU, by Linux's names.

    Empty if /proc/cpuinfo cannot be read.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
