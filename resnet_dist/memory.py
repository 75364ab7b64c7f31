"""How much memory a training step needs, and how much this process may use.

The need is estimated with tensors on the meta device, which have shapes but no content.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resnet_dist.config import Config
from resnet_dist.models.build import build_model

_GROUP_V2 = Path("/sys/fs/cgroup")
_GROUP_V1 = Path("/sys/fs/cgroup/memory")

# Numbers that each optimizer keeps for every weight.
_OPTIMIZER_STATES = {"sgd": 1, "lars": 1, "rmsprop": 2, "lamb": 2, "adamw": 2}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one rank in a training step."""

    weights: int
    """weights, gradients, optimizer state and the average of the weights, in fp32"""
    activations: int
    """what the forward pass keeps for the backward pass"""

    @property
    def total(self) -> int:
        """All bytes. Temporary buffers of single operations come on top."""
        return self.weights + self.activations


def estimate_memory(config: Config, local_batch_size: int) -> MemoryNeed:
    """The memory that one rank needs for a step of `local_batch_size` images.

    `config.train.precision` must be resolved (not auto). Under autocast, activations count half:
    convolutions and linear layers, which produce most of them, compute in 16 bits.
    """
    section = replace(config.model, sync_batch_norm=False)
    with torch.device("meta"):
        model = build_model(section, config.model.num_classes or 1000)
        size = config.data.train_crop_size
        images = torch.empty(2, 3, size, size)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    copies = 2 + _OPTIMIZER_STATES[config.optim.kind] + bool(config.train.ema_decay)
    bytes_per_image = _saved_bytes(model.train(), images) // len(images)
    if config.train.precision != "fp32":
        bytes_per_image //= 2
    return MemoryNeed(num_weights * 4 * copies, bytes_per_image * local_batch_size)


def _saved_bytes(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, without the weights."""
    weights = {_address(parameter.untyped_storage()) for parameter in model.parameters()}
    kept: dict[int, int] = {}
    # A storage that is freed may give its address to another one.
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = _address(storage)
        if address not in weights:
            kept[address] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(kept.values())


def _address(storage: torch.UntypedStorage) -> int:
    """A number of its own for each storage; on the meta device none has a data pointer."""
    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return int(reference.cdata)


def available_memory(device: torch.device, local_world_size: int) -> int:
    """Bytes that one of `local_world_size` processes may use on its device.

    On a GPU its free memory; on a CPU its share of what is free on the machine and within the
    limit of the control group (of a container or a SLURM job).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limits = [_free_on_machine(), *_free_in_control_group()]
    return min(limits) // local_world_size


def _free_on_machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo does not say MemAvailable")


def _free_in_control_group() -> list[int]:
    """Limit minus use of the control group's memory; empty if it has no limit."""
    free = []
    for limit, use in (
        (_GROUP_V2 / "memory.max", _GROUP_V2 / "memory.current"),
        (_GROUP_V1 / "memory.limit_in_bytes", _GROUP_V1 / "memory.usage_in_bytes"),
    ):
        try:
            free.append(int(limit.read_text()) - int(use.read_text()))
        except (OSError, ValueError):
            # There is no such group, or its limit is "max".
            continue
    return free
