"""What a rank uses of its GPU, for the log. Nothing here waits for the device."""

from dataclasses import dataclass

import torch

_GIB = 2**30


@dataclass(frozen=True)
class GpuMemory:
    """Memory of this process's tensors on its GPU, in bytes."""

    allocated: int
    """now"""
    peak: int
    """at most, since the start of the process"""


def read_gpu_memory(device: torch.device) -> GpuMemory | None:
    """Read the counters of PyTorch's allocator; None on a CPU.

    Args:
        device: The device of this rank.
    """
    if device.type != "cuda":
        return None
    return GpuMemory(
        allocated=torch.cuda.memory_allocated(device),
        peak=torch.cuda.max_memory_allocated(device),
    )


def gpu_figures(
    memory: GpuMemory | None, images_per_second: float, world_size: int
) -> dict[str, float]:
    """The figures of a log line that only a training on GPUs has.

    Args:
        memory: Of the main process; None on a CPU.
        images_per_second: Of all ranks.
        world_size: Number of ranks, each with a GPU.

    Returns:
        gpu/images_per_second (of one GPU), gpu/memory_gib and gpu/peak_memory_gib; nothing on a
        CPU.
    """
    if memory is None:
        return {}
    return {
        "gpu/images_per_second": images_per_second / world_size,
        "gpu/memory_gib": round(memory.allocated / _GIB, 3),
        "gpu/peak_memory_gib": round(memory.peak / _GIB, 3),
    }
