"""A checkpoint's network for other programs, and the proof that it computes the same there."""

import argparse
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from resnet_dist import __version__
from resnet_dist.config import Config, ModelConfig
from resnet_dist.data.sources.index import write_whole
from resnet_dist.state import load_network

TOLERANCE = 1e-4  # how far logits may be apart, as a share of the largest of their batch


def run(saved: dict, config: Config, options: argparse.Namespace) -> int:
    """Write options.output, read it back and compare; only then it gets its name. Returns 2, with a
    sentence, if not. The network is in fp32 and eval mode. It takes [N, 3, S, S], S
    data.val_crop_size, normalised as in evaluation.
    """
    output, data, name, count = (
        Path(options.output),
        config.data,
        config.model.name,
        len(saved["class_names"]),
    )
    unchecked, side, to = (
        output.with_name(f".{os.getpid()}.{output.name}"),
        data.val_crop_size,
        options.to,
    )
    config = replace(config, model=replace(config.model, sync_batch_norm=False))
    usual = ModelConfig(name, config.model.num_classes, sync_batch_norm=False)
    network = f"{name} {dict(asdict(config.model).items() - asdict(usual).items()) or ''}".strip()
    try:
        if output.exists():
            raise ValueError(f"--output {output} exists: take another name, or remove it")
        model, weights = load_network(saved, config, torch.device("cpu"), options.raw_weights)
        facts = {
            "model": name,
            "weights": weights,
            "resnet_dist": __version__,
            "checkpoint_sha256": hashlib.sha256(Path(options.checkpoint).read_bytes()).hexdigest(),
        }
        facts |= {
            key: json.dumps((asdict(data) | saved)[key])
            for key in ("step", "class_names", "val_resize_size", "val_crop_size", "mean", "std")
        }
        write_whole(
            str(unchecked),
            _encode(to, model.to(memory_format=torch.contiguous_format), facts, side),
            True,
        )
        found = difference(model, _decode(to, model, unchecked, name, count, network), side)
        if not found <= TOLERANCE:
            raise ValueError(
                f"it computes other logits, by {found:.1e} of the largest, than this {network}"
            )
        os.replace(unchecked, output)
    except (ValueError, OSError, ImportError) as problem:
        way_out = ": pip install 'resnet-dist[export]'" if isinstance(problem, ImportError) else ""
        print(f"error: --to {to}: {problem}{way_out}", file=sys.stderr)
        return 2
    finally:
        unchecked.unlink(missing_ok=True)
    print(
        f"{output}: {name}, {weights} weights of step {saved['step']}; read back, its logits agree to {found:.1e}"
    )
    return 0


@torch.inference_mode()
def difference(model: torch.nn.Module, other: Callable, side: int) -> float:
    """The largest difference of logits as in TOLERANCE: for an image of noise, then for five, noise
    and smooth ones.
    """
    random, ramp = (
        torch.Generator().manual_seed(0),
        torch.linspace(-2, 2, side).expand(3, side, side),
    )
    noise = torch.randn(2, 3, side, side, generator=random)
    batches = (
        noise[:1],
        torch.stack([noise[1], ramp, ramp.mT, ramp.clamp(max=-2), ramp.clamp(min=2)]),
    )
    pairs = [(model(images), other(images)) for images in batches]
    return float(torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs]).max())


def _encode(to: str, model: torch.nn.Module, facts: dict[str, str], side: int) -> bytes:
    buffer = io.BytesIO()
    if to == "safetensors":
        from safetensors.torch import save

        return save(model.state_dict(), metadata={"format": "pt", **facts})
    if to == "torchvision":
        torch.save(model.state_dict(), buffer)
        return buffer.getvalue()
    program = torch.export.export(
        model,
        (torch.zeros(2, 3, side, side),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    if to == "torch_export":
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(facts)})
        return buffer.getvalue()
    program = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], verbose=False
    )
    program.model.metadata_props.update(facts)
    return program.model_proto.SerializeToString()


def _decode(
    to: str, model: torch.nn.Module, path: Path, name: str, num_classes: int, network: str
) -> Callable:
    if to == "onnx":
        from onnxruntime import InferenceSession

        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if to == "torch_export":
        return torch.export.load(
            io.BytesIO(path.read_bytes())
        ).module()  # of a path, it wants the suffix .pt2
    own = model.state_dict()
    if to == "safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
        if weights.keys() != own.keys() or not all(
            torch.equal(weights[key], own[key]) for key in own
        ):
            raise ValueError("the tensors that were read back are not those that were written")
        return lambda images: torch.func.functional_call(model, weights, (images,))
    from torchvision import models

    with (
        torch.device("meta"),
        warnings.catch_warnings(),
    ):  # no weights are drawn that are replaced at once
        warnings.simplefilter("ignore")  # of how they would be
        theirs = getattr(models, name, lambda num_classes: torch.nn.Module())(
            num_classes=num_classes
        )
    if {key: t.shape for key, t in theirs.state_dict().items()} != {
        key: t.shape for key, t in own.items()
    }:
        raise ValueError(f"it has no {network}: take onnx, torch_export or safetensors")
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True, assign=True)
    return theirs.eval()
