"""The explanation of an error of CUDA out of memory: what was needed, what fits, the ways out."""

from dataclasses import dataclass

import torch

from resnet_dist.config import Config
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import resolve_settings
from resnet_dist.resources.gpu_usage import read_gpu_memory
from resnet_dist.resources.memory import available_memory
from resnet_dist.resources.step_memory import (
    BatchMemory,
    measure_batch_memory,
    measure_step_memory,
)

_GIB = 2**30

# The share of the memory that a suggested batch may take: the allocator loses some to fragments.
_USABLE = 0.88


@dataclass(frozen=True)
class MemoryFacts:
    """What is known about the memory of a rank when an allocation has failed, in bytes."""

    need: BatchMemory
    """of a training step, computed from the settings"""
    peak: int
    """the most that was allocated"""
    capacity: int
    """what this process can have"""


def explain_memory(problem: Exception, config: Config, runtime: Runtime) -> Exception:
    """The explanation of an error of CUDA out of memory; any other error as it is.

    Args:
        problem: What training or evaluation raised.
        config: The config of the run.
        runtime: This rank.
    """
    if isinstance(problem, torch.OutOfMemoryError):
        return out_of_memory_error(config, runtime)
    return problem


def out_of_memory_error(config: Config, runtime: Runtime) -> ValueError:
    """The error to report in place of `torch.OutOfMemoryError`, as one sentence.

    It says the local batch, the peak, how many images would fit, and the ways out.

    Args:
        config: The config of the run.
        runtime: This rank. Its watchdog knows whether it was training or evaluating.
    """
    assert runtime.watchdog is not None
    config = resolve_settings(config, runtime.device)
    capacity = _capacity(runtime)
    peak = _peak(runtime.device)
    step = runtime.watchdog.step
    peak_gib = peak / _GIB
    capacity_gib = capacity / _GIB
    where = (
        f"rank {runtime.rank} is out of GPU memory at step {step} "
        f"({peak_gib:.2f} of {capacity_gib:.2f} GiB were allocated at the peak)"
    )
    if runtime.watchdog.phase == "val":
        num_images = config.data.val_batch_size
        return ValueError(
            f"{where}, in an evaluation with batches of {num_images} images: "
            "lower data.val_batch_size, which does not change the result"
        )
    train = config.train
    micro_batches = runtime.world_size * train.grad_accum_steps
    local_batch_size = train.global_batch_size // micro_batches
    step_memory = measure_step_memory(config, local_batch_size)
    need = measure_batch_memory(config, local_batch_size, step_memory)
    most = most_images(MemoryFacts(need, peak, capacity))
    ways = _ways_out(config, runtime.world_size, most)
    return ValueError(
        f"{where}, with a local batch of {local_batch_size} images: about {most} would fit. "
        f"{'; '.join(ways)}"
    )


def most_images(facts: MemoryFacts) -> int:
    """How many images a local batch can have, at least one less than now.

    The computed memory leaves out work spaces and fragments. If more was allocated than it says,
    it is scaled by the measured peak.
    """
    need = facts.need
    measured_per_computed = facts.peak / need.step.total
    scale = max(1.0, measured_per_computed)
    usable = _USABLE * facts.capacity
    fitting = need.most_images(usable / scale)
    fewer = need.local_batch_size - 1
    return min(fitting, fewer)


def _ways_out(config: Config, world_size: int, most: int) -> list[str]:
    """What the user can do so that a local batch has at most `most` images."""
    if most < 1:
        return ["Take a smaller network or smaller images"]
    train = config.train
    largest = most * world_size * train.grad_accum_steps
    lower = f"lower train.global_batch_size to {largest} or less"
    more_gpus = "or use more GPUs"
    steps = _fitting_steps(config, world_size, most)
    if steps is None:
        return [lower.capitalize(), more_gpus]
    micro_batches = world_size * steps
    local_batch_size = train.global_batch_size // micro_batches
    accumulate = (
        f"Set train.grad_accum_steps {steps}, which makes local batches of {local_batch_size}"
    )
    return [accumulate, f"or {lower}", more_gpus]


def _fitting_steps(config: Config, world_size: int, most: int) -> int | None:
    """The smallest `train.grad_accum_steps` that divides the batch and makes it fit; or None.

    Args:
        config: The settings.
        world_size: The number of ranks.
        most: How many images fit.
    """
    train = config.train
    augment = config.augment
    mixes_pairs = augment.mixup_alpha > 0 or augment.cutmix_alpha > 0
    images_per_rank = train.global_batch_size // world_size
    fewest_steps = train.grad_accum_steps + 1
    # A local batch has at least two images.
    most_steps = images_per_rank // 2
    for steps in range(fewest_steps, most_steps + 1):
        local_batch_size, rest = divmod(images_per_rank, steps)
        if rest or local_batch_size > most:
            continue
        is_odd = local_batch_size % 2 == 1
        if mixes_pairs and is_odd:
            continue
        return steps
    return None


def _peak(device: torch.device) -> int:
    """The most memory that the tensors of this process took, in bytes; 0 on a CPU."""
    memory = read_gpu_memory(device)
    if memory is None:
        return 0
    return memory.peak


def _capacity(runtime: Runtime) -> int:
    """The memory that this process can have on its device, in bytes."""
    device = runtime.device
    free = available_memory(device, runtime.local_world_size)
    if device.type != "cuda":
        return free
    own = torch.cuda.memory_reserved(device)
    _, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    allowed = int(share * total)
    return min(free + own, allowed)
