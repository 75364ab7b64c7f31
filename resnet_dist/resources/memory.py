"""The memory that a process may use, and the most that it has used."""

import resource
from pathlib import Path

import torch

from resnet_dist.resources.host_memory import free_host_memory


def available_memory(device: torch.device, local_world_size: int) -> int:
    """The memory that a process may use on its device, in bytes.

    On a GPU this is the free memory of the GPU. On a CPU it is an equal share of the free memory of
    the machine, or of the control group (of a container or a SLURM job) if that is less.

    Args:
        device: the device of this process.
        local_world_size: number of processes on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return free_host_memory() // local_world_size


def peak_memory(device: torch.device) -> int:
    """The largest memory that this process has used so far, in bytes.

    On a GPU these are its tensors on the device; the host does not wait for them. On a CPU it is
    the whole memory of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            kibibytes = value.split()[0]
            return int(kibibytes) * 1024
    # Not every sandbox says it. This value starts with the size of the parent process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
