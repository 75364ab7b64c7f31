"""`resnet-dist export`: save the network of a checkpoint in a format of other programs.

The file is read back, and must give the same logits, before it gets its name.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_dist import __version__
from resnet_dist.checkpoints.saved_network import (
    SavedNetwork,
    load_network,
    refuse_several_processes,
)
from resnet_dist.config import Config, ModelConfig
from resnet_dist.files import replace_file
from resnet_dist.text import printable

TOLERANCE = 1e-4
"""Largest accepted difference of logits, as a share of the largest logit of the batch."""

Network = Callable[[torch.Tensor], torch.Tensor]
"""Maps normalised images [N, 3, S, S] to logits [N, classes]."""


@dataclass(frozen=True)
class Export:
    """What is exported."""

    to: str
    """format: onnx, torch_export, safetensors or torchvision"""
    name: str
    """model.name"""
    options: str
    """the name and the options of the network that differ from the defaults, for messages"""
    num_classes: int
    """number of outputs"""
    side: int
    """side of the images that the network takes: data.val_crop_size"""
    facts: dict[str, str]
    """metadata of the file, in formats that have a place for it"""


def run(
    saved: SavedNetwork,
    config: Config,
    options: argparse.Namespace,
) -> int:
    """Write the network to `options.output`, read it back, and compare.

    The network is in fp32 and in eval mode. It takes images [N, 3, S, S], where S is
    data.val_crop_size, normalised as in evaluation.

    Args:
        saved: The checkpoint.
        config: The settings of its run.
        options: `output`, the file; `to`, the format; `raw_weights`, whether to export the weights
            that were trained although the checkpoint has averaged ones.

    Returns:
        The exit code: 0, or 2 after an error, which is printed.
    """
    model_config = replace(config.model, sync_batch_norm=False)
    config = replace(config, model=model_config)
    output = Path(options.output)
    try:
        if output.exists():
            raise ValueError(
                f"--output {printable(output)} exists: take another name, or remove it"
            )
        refuse_several_processes()
        model, weights = load_network(
            saved,
            config,
            torch.device("cpu"),
            options.raw_weights,
        )
        export = _describe_export(saved, config, options.to, weights)
        found = write_export(export, model, output)
    except (ValueError, OSError, ImportError) as problem:
        message = f"--to {options.to}: {printable(problem)}"
        if isinstance(problem, ImportError):
            message += ": pip install 'resnet-dist[export]'"
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(
        f"{printable(output)}: {export.name}, {weights} weights of {saved.origin}; read back, "
        f"its logits agree to {found:.1e}"
    )
    return 0


def _describe_export(
    saved: SavedNetwork,
    config: Config,
    to: str,
    weights: str,
) -> Export:
    """Collect what is exported.

    Args:
        saved: The checkpoint.
        config: The settings of its run.
        to: The format.
        weights: Which weights of the checkpoint are exported.
    """
    data = config.data
    facts = {
        "model": config.model.name,
        "model_options": json.dumps(_changed_options(config.model)),
        "weights": weights,
        "resnet_dist": __version__,
        "checkpoint_sha256": saved.sha256,
        "step": json.dumps(saved.step),
        "class_names": json.dumps(saved.class_names),
        "val_resize_size": json.dumps(data.val_resize_size),
        "val_crop_size": json.dumps(data.val_crop_size),
        "val_interpolation": json.dumps(data.val_interpolation),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
    }
    return Export(
        to=to,
        name=config.model.name,
        options=_name_with_options(config.model),
        num_classes=saved.num_classes,
        side=data.val_crop_size,
        facts=facts,
    )


def _name_with_options(config: ModelConfig) -> str:
    """The name of a network, and its options that differ from the defaults."""
    changed = _changed_options(config)
    if changed:
        return f"{config.name} {changed}"
    return config.name


def _changed_options(config: ModelConfig) -> dict[str, Any]:
    """The options of a network that differ from the defaults."""
    default = ModelConfig(
        name=config.name,
        num_classes=config.num_classes,
        sync_batch_norm=False,
    )
    default_values = asdict(default)
    changed = {}
    for key, value in asdict(config).items():
        if value != default_values[key]:
            changed[key] = value
    return changed


def write_export(
    export: Export,
    model: nn.Module,
    output: Path,
) -> float:
    """Write the network to a file, read it back, and compare the logits.

    Args:
        export: What is exported.
        model: The network.
        output: The file. It does not exist if this raises.

    Returns:
        The largest difference of logits, see `difference`.

    Raises:
        ValueError: The file gives other logits, or the format cannot hold this network.
        ImportError: The library for the format is not installed.
        OSError: The file cannot be written.
    """
    write = _WRITERS[export.to]
    read = _READERS[export.to]
    content = write(export, model.to(memory_format=torch.contiguous_format))
    with replace_file(output) as file:
        file.write(content)
        file.flush()
        network = read(export, model, Path(file.name))
        found = difference(model, network, export.side)
        # "found > TOLERANCE" would accept NaN.
        is_equal = found <= TOLERANCE
        if not is_equal:
            raise ValueError(
                f"it computes other logits, by {found:.1e} of the largest, than this "
                f"{export.options}"
            )
    return found


@torch.inference_mode()
def difference(
    model: Network,
    other: Network,
    side: int,
) -> float:
    """Compare the logits of two networks.

    The inputs are a batch of one image of noise, and a batch of five images: noise, two ramps, a
    dark and a bright image.

    Args:
        model: The reference.
        other: The network that is compared with it.
        side: Side of the images in pixels.

    Returns:
        The largest difference, as a share of the largest logit of the batch. NaN if a logit is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, side, side, generator=generator)
    ramp = torch.linspace(-2, 2, side).expand(3, side, side)
    dark = ramp.clamp(max=-2)
    bright = ramp.clamp(min=2)
    single = noise[:1]
    several = torch.stack([noise[1], ramp, ramp.mT, dark, bright])
    differences = []
    for images in (single, several):
        expected = model(images)
        largest_difference = (other(images) - expected).abs().max()
        largest_logit = expected.abs().max()
        differences.append(largest_difference / largest_logit)
    # The maximum of torch, unlike that of Python, is NaN if any value is.
    return float(torch.stack(differences).max())


def _write_safetensors(export: Export, model: nn.Module) -> bytes:
    """The weights as the content of a .safetensors file."""
    from safetensors.torch import save

    metadata = {"format": "pt", **export.facts}
    content: bytes = save(model.state_dict(), metadata=metadata)
    return content


def _read_safetensors(
    export: Export,
    model: nn.Module,
    path: Path,
) -> Network:
    """Our network with the weights of a .safetensors file.

    Raises:
        ValueError: The weights are not those of `model`.
    """
    from safetensors.torch import load_file

    expected = model.state_dict()
    weights = load_file(path)
    if weights.keys() != expected.keys():
        raise ValueError("the names that were read back are not those that were written")
    for key, tensor in expected.items():
        if not torch.equal(weights[key], tensor):
            raise ValueError(f"the tensor {key} that was read back is not the one that was written")

    def network(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(model, weights, (images,))
        return logits

    return network


def _write_torchvision(export: Export, model: nn.Module) -> bytes:
    """The weights as the content of a file of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def _read_torchvision(
    export: Export,
    model: nn.Module,
    path: Path,
) -> Network:
    """Torchvision's network with the weights of a file.

    Raises:
        ValueError: Torchvision has no such network.
    """
    network = _torchvision_network(export.name, export.num_classes)
    if _shapes(network) != _shapes(model):
        raise ValueError(f"it has no {export.options}: take onnx, torch_export or safetensors")
    weights = torch.load(path, weights_only=True)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    """The shape of each tensor of a network."""
    shapes = {}
    for key, tensor in network.state_dict().items():
        shapes[key] = tensor.shape
    return shapes


def _torchvision_network(name: str, num_classes: int) -> nn.Module:
    """Build a network of torchvision on the meta device.

    Args:
        name: Its name.
        num_classes: Number of outputs.

    Returns:
        The network, or an empty module if torchvision has none of that name.
    """
    from torchvision import models

    build = getattr(models, name, None)
    if build is None:
        return nn.Module()
    with torch.device("meta"), warnings.catch_warnings():
        # Some networks warn about the time that their initialisation takes.
        warnings.simplefilter("ignore")
        network: nn.Module = build(num_classes=num_classes)
    return network


def _exported_program(export: Export, model: nn.Module) -> torch.export.ExportedProgram:
    """Trace the network with `torch.export`. The batch size is dynamic, the image size is not."""
    images = torch.zeros(2, 3, export.side, export.side)
    batch = torch.export.Dim("batch", min=1)
    dynamic_shapes = ({0: batch},)
    return torch.export.export(
        model,
        (images,),
        dynamic_shapes=dynamic_shapes,
    )


def _write_torch_export(export: Export, model: nn.Module) -> bytes:
    """The network as the content of a .pt2 file."""
    program = _exported_program(export, model)
    extra_files = {"metadata.json": json.dumps(export.facts)}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=extra_files)
    return buffer.getvalue()


def _read_torch_export(
    export: Export,
    model: nn.Module,
    path: Path,
) -> Network:
    """The network in a .pt2 file."""
    # torch refuses a path without the suffix .pt2, which the temporary file does not have.
    buffer = io.BytesIO(path.read_bytes())
    return torch.export.load(buffer).module()


def _write_onnx(export: Export, model: nn.Module) -> bytes:
    """The network as the content of an .onnx file."""
    program = torch.onnx.export(
        _exported_program(export, model),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    _name_batch_dimension(program.model)
    program.model.metadata_props.update(export.facts)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _name_batch_dimension(model: Any) -> None:  # noqa: ANN401  onnx_ir has no types
    """Rename the dynamic dimension to "batch". torch.export calls it s77 or similar."""
    from onnx_ir import SymbolicDim

    graph = model.graph
    generated_name = graph.inputs[0].shape[0].value
    values = [*graph.inputs, *graph.outputs]
    for node in graph:
        values.extend(node.outputs)
    for value in values:
        sizes = value.shape or ()
        for axis, size in enumerate(sizes):
            name = getattr(size, "value", None)
            if name == generated_name:
                value.shape[axis] = SymbolicDim("batch")


def _read_onnx(
    export: Export,
    model: nn.Module,
    path: Path,
) -> Network:
    """The network in an .onnx file, run by ONNX Runtime on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def network(images: torch.Tensor) -> torch.Tensor:
        inputs = {"images": images.numpy()}
        logits = session.run(None, inputs)[0]
        return torch.from_numpy(logits)

    return network


_WRITERS: dict[str, Callable[[Export, nn.Module], bytes]] = {
    "onnx": _write_onnx,
    "torch_export": _write_torch_export,
    "safetensors": _write_safetensors,
    "torchvision": _write_torchvision,
}
_READERS: dict[str, Callable[[Export, nn.Module, Path], Network]] = {
    "onnx": _read_onnx,
    "torch_export": _read_torch_export,
    "safetensors": _read_safetensors,
    "torchvision": _read_torchvision,
}
