"""The arithmetic of the forward and backward pass: what `train.precision` means on the hardware at
hand.
"""

import contextlib
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_CPU_FLAGS_OF_FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's names of the instructions: two of x86-64, and one of 64-bit Arm."""


def resolve_precision(setting: str, device: torch.device) -> str:
    """The precision that `setting` stands for on `device`: "fp32", "bf16" or "fp16".

    `auto` is the fastest precision that the hardware computes natively: bf16 where it has it, else
    fp16 on a GPU and fp32 on a CPU.
    """
    if setting != "auto":
        return setting
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16. Without them PyTorch emulates it, several times
    slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _CPU_FLAGS_OF_FAST_BF16.isdisjoint(cpu_flags())


def cpu_flags() -> set[str]:
    """The instruction sets of this machine's CPU, by Linux's names; empty where /proc/cpuinfo
    cannot be read.
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


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Run what is inside in the given precision, as far as that is safe; fp32 changes nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
