"""`resnet-dist plan`: what a training needs, before it runs.

Everything is computed from the settings; no speed is guessed. The memory comes from a training step
on tensors without contents.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from resnet_dist.config import Config
from resnet_dist.data.sources.digits import NUM_TRAIN_DIGITS
from resnet_dist.data.sources.scan import SingleProcess, build_index
from resnet_dist.layout import check_layout
from resnet_dist.resources.step_cost import count_step
from resnet_dist.resources.step_memory import (
    StepMemory,
    measure_batch_memory,
    measure_step_memory,
)
from resnet_dist.schedule import epochs_to_steps, peak_lr
from resnet_dist.settings.options import print_error
from resnet_dist.teacher import find_teacher

_GIB = 2**30
_MIB = 2**20

_IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Plan:
    """What a training needs. Memory is in bytes, of one GPU."""

    network: str
    image_size: int
    precision: str
    num_gpus: int
    local_batch_size: int
    grad_accum_steps: int
    global_batch_size: int
    peak_lr: float
    memory: StepMemory
    flops_per_image: int
    """of forward and backward pass, and the teacher's forward pass; a multiplication and an
    addition count as two"""
    num_images: int
    """of the training set"""
    source_of_images: str
    steps_per_epoch: int
    total_steps: int
    most_local_batch: int | None
    """images that fit the given memory; None if no memory was given"""
    images_per_second: float | None
    """what all GPUs together have to train, and the data to deliver, for the wished duration"""


def run(config: Config, options: argparse.Namespace) -> int:
    """Print the plan.

    Args:
        config: The settings of training.
        options: `gpus`, `memory_gib`, `hours`, `images` and `json`; 0 where it was not given.

    Returns:
        The exit code: 0, or 2 if the settings do not fit together.
    """
    try:
        plan = make_plan(config, options)
    except ValueError as problem:
        print_error(problem)
        return 2
    if options.json:
        print(json.dumps(_as_json(plan)))
    else:
        print(describe_plan(plan, options))
    return 0


def make_plan(config: Config, options: argparse.Namespace) -> Plan:
    """Compute the plan; see `run` for the arguments.

    Raises:
        ValueError: The global batch cannot be divided, or the training set is too small or cannot
            be read.
    """
    config = _for_a_gpu(config)
    train = config.train
    mixes_pairs = config.augment.mixup_alpha > 0 or config.augment.cutmix_alpha > 0
    local_batch_size = check_layout(
        train.global_batch_size, options.gpus, train.grad_accum_steps, pairs=mixes_pairs
    )
    num_images, source = _find_num_images(config, options.images)
    steps_per_epoch = num_images // train.global_batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"train.global_batch_size is {train.global_batch_size}, but the training set has "
            f"{num_images} images: an epoch must have at least one step"
        )
    total_steps = max(1, epochs_to_steps(train.epochs, steps_per_epoch))
    teacher = find_teacher(config)
    memory = measure_step_memory(config, local_batch_size, teacher)
    most_local_batch = None
    if options.memory_gib:
        growing = measure_batch_memory(config, local_batch_size, memory, teacher)
        most_local_batch = growing.most_images(options.memory_gib * _GIB)
    images_per_second = None
    if options.hours:
        images_per_second = total_steps * train.global_batch_size / (3600 * options.hours)
    return Plan(
        network=config.model.name,
        image_size=config.data.train_crop_size,
        precision=train.precision,
        num_gpus=options.gpus,
        local_batch_size=local_batch_size,
        grad_accum_steps=train.grad_accum_steps,
        global_batch_size=train.global_batch_size,
        peak_lr=peak_lr(
            config.optim.base_lr, config.optim.base_batch_size, train.global_batch_size
        ),
        memory=memory,
        flops_per_image=count_step(config, teacher).flops_per_image,
        num_images=num_images,
        source_of_images=source,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        most_local_batch=most_local_batch,
        images_per_second=images_per_second,
    )


def _for_a_gpu(config: Config) -> Config:
    """The config with its precision and number of classes known.

    `auto` is bf16, as on GPUs since 2020. Without data there are the classes of ImageNet or of the
    digits.
    """
    train = config.train
    if train.precision == "auto":
        train = replace(train, precision="bf16")
    model = config.model
    if model.num_classes is None and config.data.kind == "digits":
        model = replace(model, num_classes=10)
    return replace(config, train=train, model=model)


def _find_num_images(config: Config, given: int) -> tuple[int, str]:
    """The number of training images, and where it comes from.

    Args:
        config: The settings.
        given: The option --images; 0 if it was not given.
    """
    data = config.data
    if given:
        return given, "--images"
    if data.kind == "digits":
        return NUM_TRAIN_DIGITS, "the digits"
    if data.kind == "synthetic":
        return data.synthetic_images, "data.synthetic_images"
    if not data.data_dir:
        return _IMAGENET_IMAGES, "ImageNet, since data.data_dir is empty"
    index = build_index(data.data_dir, "train", SingleProcess(), data.exclude, data.rescan)
    return len(index), "data.data_dir"


def describe_plan(plan: Plan, options: argparse.Namespace) -> str:
    """The plan as lines of text."""
    memory = plan.memory
    flops = f"{plan.flops_per_image / 1e9:.2f} G per image, forward and backward pass"
    if memory.teacher:
        flops += ", with the teacher's forward pass"
    rows = {
        "parameters": f"{memory.num_parameters:,}",
        "FLOPs": flops,
        "batch": f"{plan.global_batch_size} = {plan.num_gpus} GPUs * {plan.grad_accum_steps} "
        f"micro-steps * {plan.local_batch_size}, peak lr {plan.peak_lr:g}",
        "memory": _describe_memory(memory),
    }
    if plan.most_local_batch is not None:
        most_images = plan.most_local_batch * plan.num_gpus * plan.grad_accum_steps
        rows["largest batch"] = (
            f"{plan.most_local_batch:,} on each GPU, {most_images:,} in all, in "
            f"{options.memory_gib:g} GiB"
        )
    rows["steps"] = (
        f"{plan.total_steps:,}, {plan.steps_per_epoch:,} per epoch of {plan.num_images:,} images "
        f"({plan.source_of_images})"
    )
    if plan.images_per_second is not None:
        per_gpu = plan.images_per_second / plan.num_gpus
        rows["data"] = (
            f"{plan.images_per_second:,.0f} images/s, {per_gpu:,.0f} for each GPU, to train in "
            f"{options.hours:g} h; evaluations and starts come on top"
        )
    width = max(map(len, rows))
    lines = [f"{plan.network}, {plan.image_size} pixels, {plan.precision}"]
    for name, value in rows.items():
        lines.append(f"{name:<{width}}   {value}")
    lines.append(
        "The memory is that of PyTorch's tensors in eager mode. The context of the GPU, work "
        "spaces, batches loaded ahead and fragments come on top: leave a tenth free."
    )
    return "\n".join(lines)


def _describe_memory(memory: StepMemory) -> str:
    """The memory of a GPU and its parts."""
    unit = "GiB"
    bytes_of_unit = _GIB
    if memory.total < _GIB:
        unit = "MiB"
        bytes_of_unit = _MIB
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "averaged weights": memory.average,
        "teacher": memory.teacher,
        "activations and gradients at the peak": memory.step,
    }
    texts = []
    for name, num_bytes in parts.items():
        if num_bytes:
            texts.append(f"{name} {num_bytes / bytes_of_unit:.2f}")
    total = memory.total / bytes_of_unit
    return f"{total:.2f} {unit} on each GPU: {', '.join(texts)}"


def _as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, with the sum of the memory."""
    values = asdict(plan)
    values["memory"]["total"] = plan.memory.total
    return values
