"""The memory that a training step needs, and the memory that a process may use.

The need is estimated on the meta device, whose tensors have shapes but no contents.
"""

import resource
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resnet_dist.config import Config
from resnet_dist.host_memory import free_host_memory
from resnet_dist.models.build import build_model

_BYTES_OF_FP32 = 4

OPTIMIZER_STATES = {
    "sgd": 1,
    "lars": 1,
    "rmsprop": 2,
    "lamb": 2,
    "adamw": 2,
}
"""How many values each optimizer stores for each weight."""


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of one rank in a training step, in bytes."""

    weights: int
    """weights, gradients, optimizer state and the moving average of the weights, in fp32"""
    activations: int
    """tensors that the forward pass saves for the backward pass"""

    @property
    def total(self) -> int:
        """The sum, without temporary buffers of single operations."""
        return self.weights + self.activations


def estimate_memory(config: Config, local_batch_size: int) -> MemoryNeed:
    """Estimate the memory that one rank needs for a training step.

    Args:
        config: the settings; `train.precision` must be resolved, so it must not be "auto".
        local_batch_size: number of images of a micro-step on one rank.
    """
    # The forward pass below runs in this process alone.
    model_config = replace(config.model, sync_batch_norm=False)
    num_classes = config.model.num_classes or 1000
    size = config.data.train_crop_size
    with torch.device("meta"):
        model = build_model(model_config, num_classes)
        images = torch.empty(2, 3, size, size)
    model.train()

    # Weights and gradients.
    copies = 2
    copies += OPTIMIZER_STATES[config.optim.kind]
    if config.train.ema_decay:
        copies += 1
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = num_weights * _BYTES_OF_FP32 * copies

    bytes_per_image = _saved_bytes(model, images) // len(images)
    if config.train.precision != "fp32":
        # Under autocast, convolutions and linear layers compute in 16 bits. They produce most of
        # the activations.
        bytes_per_image //= 2
    return MemoryNeed(weight_bytes, bytes_per_image * local_batch_size)


def _saved_bytes(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Number of bytes that autograd saves in a forward pass.

    Each storage counts once. The weights do not count.

    Args:
        model: a network in training mode, on the meta device.
        images: [n, 3, H, W], on the meta device.
    """
    weights = set()
    for parameter in model.parameters():
        weights.add(_address(parameter.untyped_storage()))
    saved: dict[int, int] = {}
    # A new storage may get the address of one that was freed, so this list keeps all of them alive.
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = _address(storage)
        if address not in weights:
            saved[address] = storage.nbytes()
            alive.append(storage)
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(images)
    return sum(saved.values())


def _address(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage. On the meta device storages have no data pointer."""
    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return int(reference.cdata)


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
