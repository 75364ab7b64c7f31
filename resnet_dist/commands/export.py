"""A checkpoint's network for other programs, and the proof that it computes the same there."""

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
from resnet_dist.config import Config, ModelConfig
from resnet_dist.files import replace_file
from resnet_dist.saved_network import SavedNetwork, load_network
from resnet_dist.text import printable

TOLERANCE = 1e-4
"""How far logits may be apart, as a share of the largest of their batch."""

Network = Callable[[torch.Tensor], torch.Tensor]
"""Logits [N, classes] of normalised images [N, 3, S, S]."""


@dataclass(frozen=True)
class Export:
    """One network on its way into a file."""

    to: str
    """onnx, torch_export, safetensors or torchvision"""
    name: str
    """model.name"""
    options: str
    """the name and the options of the network that are not the usual ones, for messages"""
    num_classes: int
    side: int
    """data.val_crop_size, side of the images that the network takes"""
    facts: dict[str, str]
    """what the file says about the network, where the format has room for it"""


def run(saved: SavedNetwork, config: Config, options: argparse.Namespace) -> int:
    """Write `options.output`, read it back, and compare; only then does it get its name.

    The network is in fp32 and eval mode. It takes images [N, 3, S, S] with S data.val_crop_size,
    normalised as in evaluation. Returns 0, or 2 after an error that is printed.
    """
    config = replace(config, model=replace(config.model, sync_batch_norm=False))
    output = Path(options.output)
    try:
        if output.exists():
            raise ValueError(
                f"--output {printable(output)} exists: take another name, or remove it"
            )
        model, weights = load_network(saved, config, torch.device("cpu"), options.raw_weights)
        export = _describe_export(saved, config, options.to, weights)
        found = write_export(export, model, output)
    except (ValueError, OSError, ImportError) as problem:
        way_out = ": pip install 'resnet-dist[export]'" if isinstance(problem, ImportError) else ""
        print(f"error: --to {options.to}: {printable(problem)}{way_out}", file=sys.stderr)
        return 2
    print(
        f"{printable(output)}: {export.name}, {weights} weights of step {saved.step}; read back, "
        f"its logits agree to {found:.1e}"
    )
    return 0


def _describe_export(saved: SavedNetwork, config: Config, to: str, weights: str) -> Export:
    data = config.data
    usual = ModelConfig(config.model.name, config.model.num_classes, sync_batch_norm=False)
    changed = dict(asdict(config.model).items() - asdict(usual).items())
    facts = {
        "model": config.model.name,
        "weights": weights,
        "resnet_dist": __version__,
        "checkpoint_sha256": saved.sha256,
        "step": json.dumps(saved.step),
        "class_names": json.dumps(saved.class_names),
        "val_resize_size": json.dumps(data.val_resize_size),
        "val_crop_size": json.dumps(data.val_crop_size),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
    }
    return Export(
        to=to,
        name=config.model.name,
        options=f"{config.model.name} {changed or ''}".strip(),
        num_classes=len(saved.class_names),
        side=data.val_crop_size,
        facts=facts,
    )


def write_export(export: Export, model: nn.Module, output: Path) -> float:
    """Write the network to `output`, unless it computes something else when it is read back.

    Returns the largest difference of logits, as `difference`.

    Raises:
        ValueError: The file that was written does not compute the same, or the format has no such
            network.
        ImportError: The library of the format is not installed.
        OSError: The file cannot be written.
    """
    content = _WRITERS[export.to](export, model.to(memory_format=torch.contiguous_format))
    with replace_file(output) as file:
        file.write(content)
        file.flush()
        network = _READERS[export.to](export, model, Path(file.name))
        found = difference(model, network, export.side)
        # Not "found > TOLERANCE", which is false for NaN.
        if not found <= TOLERANCE:
            raise ValueError(
                f"it computes other logits, by {found:.1e} of the largest, than this "
                f"{export.options}"
            )
    return found


@torch.inference_mode()
def difference(model: Network, other: Network, side: int) -> float:
    """The largest difference of logits, as a share of the largest logit of the batch.

    Compared are a batch of one image of noise, and one of five images, noise and smooth ones.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, side, side, generator=generator)
    ramp = torch.linspace(-2, 2, side).expand(3, side, side)
    dark = ramp.clamp(max=-2)
    bright = ramp.clamp(min=2)
    batches = (noise[:1], torch.stack([noise[1], ramp, ramp.mT, dark, bright]))
    worst = []
    for images in batches:
        expected = model(images)
        worst.append((other(images) - expected).abs().max() / expected.abs().max())
    # torch's maximum is NaN if any value is.
    return float(torch.stack(worst).max())


def _write_safetensors(export: Export, model: nn.Module) -> bytes:
    from safetensors.torch import save

    content: bytes = save(model.state_dict(), metadata={"format": "pt", **export.facts})
    return content


def _read_safetensors(export: Export, model: nn.Module, path: Path) -> Network:
    from safetensors.torch import load_file

    own = model.state_dict()
    weights = load_file(path)
    if weights.keys() != own.keys():
        raise ValueError("the names that were read back are not those that were written")
    for key, tensor in own.items():
        if not torch.equal(weights[key], tensor):
            raise ValueError(f"the tensor {key} that was read back is not the one that was written")

    def network(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(model, weights, (images,))
        return logits

    return network


def _write_torchvision(export: Export, model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def _read_torchvision(export: Export, model: nn.Module, path: Path) -> Network:
    theirs = _torchvision_network(export.name, export.num_classes)
    if _shapes(theirs) != _shapes(model):
        raise ValueError(f"it has no {export.options}: take onnx, torch_export or safetensors")
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True, assign=True)
    return theirs.eval()


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def _torchvision_network(name: str, num_classes: int) -> nn.Module:
    """Torchvision's network of that name without memory for weights; an empty one if unknown."""
    from torchvision import models

    build = getattr(models, name, None)
    if build is None:
        return nn.Module()
    with torch.device("meta"), warnings.catch_warnings():
        # Some networks warn of how they would be initialised.
        warnings.simplefilter("ignore")
        network: nn.Module = build(num_classes=num_classes)
    return network


def _exported_program(export: Export, model: nn.Module) -> torch.export.ExportedProgram:
    # The batch size is free, the side of the images is not.
    images = torch.zeros(2, 3, export.side, export.side)
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))


def _write_torch_export(export: Export, model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    extra_files = {"metadata.json": json.dumps(export.facts)}
    torch.export.save(_exported_program(export, model), buffer, extra_files=extra_files)
    return buffer.getvalue()


def _read_torch_export(export: Export, model: nn.Module, path: Path) -> Network:
    # From bytes: of a path, torch expects the suffix .pt2.
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_onnx(export: Export, model: nn.Module) -> bytes:
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
    """Call the free dimension `batch`; torch.export has called it s77 or the like."""
    from onnx_ir import SymbolicDim

    graph = model.graph
    invented = graph.inputs[0].shape[0].value
    values = [*graph.inputs, *graph.outputs]
    for node in graph:
        values.extend(node.outputs)
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if getattr(size, "value", None) == invented:
                value.shape[axis] = SymbolicDim("batch")


def _read_onnx(export: Export, model: nn.Module, path: Path) -> Network:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

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
