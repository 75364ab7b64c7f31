"""The memory of a training step, found by running it on tensors without contents.

Forward pass, loss and backward pass run under PyTorch's FakeTensorMode, which computes shapes and
types and nothing else. Each storage counts from the operation that makes it until it is freed.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_dist.config import Config, ModelConfig
from resnet_dist.forward import all_logits, at_least_fp32, train_mode
from resnet_dist.losses import build_loss
from resnet_dist.models.build import build_on_meta
from resnet_dist.models.weights import freeze
from resnet_dist.resources.operations import OperationWatch, Tensors

_BYTES_OF_FP32 = 4

# How many values each optimizer stores for each weight.
_OPTIMIZER_STATES = {
    "sgd": 1,
    "lars": 1,
    "rmsprop": 2,
    "lamb": 2,
    "adamw": 2,
}

# Images on top of a batch, to find the memory that a further image takes.
_FURTHER_IMAGES = 4


@dataclass(frozen=True)
class StepMemory:
    """The memory of one rank during a training step, in bytes.

    Not counted are the context of the GPU (about half a GiB), work spaces of the libraries, batches
    that are loaded ahead, and what the allocator loses to fragments.
    """

    num_parameters: int
    weights: int
    """weights and buffers, in fp32"""
    optimizer: int
    """state of the optimizer"""
    average: int
    """moving average of the weights"""
    step: int
    """at the peak of the step: images, activations, gradients and temporary tensors"""
    teacher: int = 0
    """weights and buffers of the teacher, in fp32"""

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.optimizer + self.average + self.step + self.teacher


@dataclass(frozen=True)
class BatchMemory:
    """The memory of a training step and how it grows, in bytes."""

    step: StepMemory
    """of a step with `local_batch_size` images"""
    local_batch_size: int
    bytes_per_image: float
    """that a further image takes"""

    def most_images(self, capacity: float) -> int:
        """The largest local batch whose memory is at most `capacity` bytes; 0 if none fits."""
        further = (capacity - self.step.total) / self.bytes_per_image
        return max(0, int(self.local_batch_size + further))


def measure_batch_memory(
    config: Config, local_batch_size: int, step: StepMemory, teacher: ModelConfig | None = None
) -> BatchMemory:
    """Find the memory that a further image takes.

    Args:
        config: The config of the run.
        local_batch_size: Number of images of a micro-step.
        step: The result of `measure_step_memory` for them.
        teacher: As for `measure_step_memory`.
    """
    larger = measure_step_memory(config, local_batch_size + _FURTHER_IMAGES, teacher)
    bytes_per_image = (larger.total - step.total) / _FURTHER_IMAGES
    return BatchMemory(step, local_batch_size, max(1.0, bytes_per_image))


def measure_step_memory(
    config: Config, local_batch_size: int, teacher: ModelConfig | None = None
) -> StepMemory:
    """Find the memory that a training step needs on one rank.

    Args:
        config: The config of the run; `train.precision` must be resolved. Batch norm is taken as
            that of a single rank.
        local_batch_size: Number of images of a micro-step.
        teacher: The teacher of a distillation; None for none.
    """
    # Not with fake tensors: initialization may look at values, which these do not have.
    model = build_on_meta(config.model)
    freeze(model, config.optim.unfreeze_from)
    train_mode(model)
    teacher_network = None
    if teacher is not None:
        teacher_network = build_on_meta(teacher)
        teacher_network.eval().requires_grad_(False)
    peak = _peak_of_step(config, local_batch_size, model, teacher_network)

    num_parameters = 0
    num_trained = 0
    for parameter in model.parameters():
        num_parameters += parameter.numel()
        if parameter.requires_grad:
            num_trained += parameter.numel()
    state_bytes = _bytes_of_state(model)
    return StepMemory(
        num_parameters=num_parameters,
        weights=state_bytes,
        optimizer=num_trained * _BYTES_OF_FP32 * _OPTIMIZER_STATES[config.optim.kind],
        average=state_bytes if config.train.ema_decay else 0,
        step=peak,
        teacher=0 if teacher_network is None else _bytes_of_state(teacher_network),
    )


def _peak_of_step(
    config: Config, local_batch_size: int, model: nn.Module, teacher: nn.Module | None
) -> int:
    """The most memory that the tensors of a step take at the same time, in bytes.

    The weights are not counted. Both networks have fake tensors afterwards.
    """
    side = config.data.train_crop_size
    dtype = torch.float32
    if config.train.precision != "fp32":
        # Both types of 16 bits take the same memory.
        dtype = torch.bfloat16
    loss_fn = build_loss(config.train)
    networks = [model] if teacher is None else [model, teacher]
    with FakeTensorMode():
        for network in networks:
            _make_fake(network)
        images = torch.empty(local_batch_size, 3, side, side, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(local_batch_size, dtype=torch.int64)
        with _Storages() as storages:
            for network in networks:
                for tensor in (*network.parameters(), *network.buffers()):
                    storages.ignore(tensor)
            storages.count(images)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if teacher is not None:
                    # Its predictions are kept until the loss.
                    with torch.no_grad():
                        predictions = all_logits(teacher(images))
                logits = all_logits(model(images))
            losses = []
            for logits_of_head in logits:
                losses.append(loss_fn(at_least_fp32(logits_of_head), labels, None).mean())
            del logits, logits_of_head
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            if teacher is not None:
                del predictions
    peak: int = storages.peak
    return peak


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors on the CPU, in a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            replacement = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            setattr(module, name, replacement)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _bytes_of_state(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        total += tensor.numel() * tensor.element_size()
    return total


class _Storages(OperationWatch):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operations make.

    Attributes:
        peak: The most that was alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count the storage of a tensor."""
        self._known.add(tensor.untyped_storage())

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed, unless it is known already."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self._alive += num_bytes
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self._alive -= num_bytes

    def see(self, operation: Any, inputs: Tensors, results: Tensors) -> None:  # noqa: ANN401
        """Count the storages of the results of an operation."""
        for tensor in results:
            self.count(tensor)
