"""Exports of a checkpoint: each computes what the checkpoint computes, in the program it is for."""

import errno
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_utils import load_content

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import write_checkpoint
from resnet_dist.checkpoints.saved_network import load_network, open_network
from resnet_dist.commands import export
from resnet_dist.config import Config, DataConfig, ModelConfig, to_dict
from resnet_dist.models.build import build_model


class Result(NamedTuple):
    """What came of an export."""

    code: int
    file: Path
    out: str
    err: str


@pytest.fixture
def run(tmp_path, capfd):
    """A function that exports a checkpoint, and finds that no temporary file is left."""

    def run(checkpoint, to, *more):
        output = tmp_path / f"exported.{to}"
        code = cli.main(
            [
                "export",
                *("--checkpoint", str(checkpoint)),
                *("--to", to),
                *("--output", str(output)),
                *more,
            ]
        )
        assert list(tmp_path.glob(".*")) == []
        out, err = capfd.readouterr()
        return Result(code, output, out, err)

    return run


def check_success(result):
    """It prints one line, and no warning."""
    assert result.code == 0
    assert result.err == ""
    assert result.out.count("\n") == 1


def check_failure(result, words):
    """It says why, and writes nothing."""
    assert result.code == 2
    assert words in result.err
    assert not result.file.exists()


def network(checkpoint, raw=False):
    """The network of a checkpoint, with averaged weights unless `raw`."""
    saved = open_network(Path(checkpoint))
    config = Config(model=ModelConfig("resnet20"))
    model, _ = load_network(saved, config, torch.device("cpu"), raw)
    return model


def random_images(number, side=16):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number, 3, side, side, generator=generator)


def check_metadata(facts, checkpoint):
    """The facts about the checkpoint, which an exported file holds as text."""
    digest_file = Path(checkpoint).resolve().with_suffix(".pt.sha256")
    digest, _ = digest_file.read_text().split()
    assert facts["model"] == "resnet20"
    assert facts["weights"] == "ema"
    assert facts["checkpoint_sha256"] == digest
    assert json.loads(facts["class_names"]) == list("0123456789")
    assert json.loads(facts["mean"]) == [0.5, 0.5, 0.5]
    assert facts["val_resize_size"] == "18"
    assert facts["val_crop_size"] == "16"
    assert facts["step"] == "2"


@pytest.mark.slow
@torch.inference_mode()
def test_onnx(checkpoint, run):
    """ONNX Runtime computes the same logits for batches of any size."""
    import onnxruntime

    result = run(checkpoint, "onnx")
    check_success(result)
    assert f"{result.file}: resnet20, ema weights of step 2" in result.out
    session = onnxruntime.InferenceSession(result.file)
    [given] = session.get_inputs()
    [computed] = session.get_outputs()
    assert given.shape == ["batch", 3, 16, 16]
    assert computed.shape == ["batch", 10]

    model = network(checkpoint)
    for batch_size in (1, 7):
        images = random_images(batch_size)
        [logits] = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, model(images).numpy(), atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    check_metadata(facts, checkpoint)


@pytest.mark.slow
@torch.inference_mode()
def test_torch_export(checkpoint, run):
    """The program computes the same logits for batches of any size, here of smaller images."""
    result = run(
        checkpoint,
        "torch_export",
        "--raw_weights",
        *("--data.val_crop_size", "12"),
    )
    check_success(result)
    assert "model weights of step 2" in result.out
    extra_files = {"metadata.json": ""}
    with result.file.open("rb") as file:
        program = torch.export.load(file, extra_files=extra_files)
    facts = json.loads(extra_files["metadata.json"])
    assert facts["weights"] == "model"
    assert facts["val_crop_size"] == "12"

    exported = program.module()
    model = network(checkpoint, raw=True)
    for batch_size in (1, 7):
        images = random_images(batch_size, side=12)
        torch.testing.assert_close(
            exported(images),
            model(images),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.slow
def test_safetensors(checkpoint, run):
    from safetensors import safe_open

    result = run(checkpoint, "safetensors")
    check_success(result)
    content = load_content(Path(checkpoint))
    weights = content["ema"]
    with safe_open(result.file, "pt") as file:
        assert set(file.keys()) == set(weights)
        for name, tensor in weights.items():
            assert torch.equal(file.get_tensor(name), tensor), name
        check_metadata(file.metadata(), checkpoint)

    # A file that exists is not written over.
    before = result.file.read_bytes()
    again = run(checkpoint, "safetensors")
    assert again.code == 2
    assert "exists" in again.err
    assert result.file.read_bytes() == before


def save_untrained(path, **options):
    """Save a network that was never trained, and return it in eval mode."""
    config = Config(
        model=ModelConfig(num_classes=4, **options),
        data=DataConfig(val_crop_size=32),
    )
    torch.manual_seed(0)
    model = build_model(config.model, 4).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    content = {
        "format": 1,
        "config": to_dict(config),
        "class_names": list("abcd"),
        "step": 1,
        "ema": None,
        "model": model.state_dict(),
    }
    write_checkpoint(path, content)
    return model.eval()


@pytest.mark.slow
@torch.inference_mode()
def test_torchvision(tmp_path, run, checkpoint):
    """torchvision's network of that name computes the same logits, or there is no export."""
    import torchvision

    path = tmp_path / "resnet18.pt"
    ours = save_untrained(path, name="resnet18", zero_init_residual=True)
    result = run(path, "torchvision")
    check_success(result)
    theirs = torchvision.models.resnet18(num_classes=4)
    weights = torch.load(result.file, weights_only=True)
    theirs.load_state_dict(weights, strict=True)
    theirs.eval()
    images = random_images(3)
    torch.testing.assert_close(
        theirs(images),
        ours(images),
        atol=1e-5,
        rtol=0,
    )
    result.file.unlink()

    result = run(checkpoint, "torchvision")
    check_failure(result, "it has no resnet20: take onnx, torch_export or safetensors")

    # Of the same keys and shapes, and another network: only the logits tell.
    path = tmp_path / "resnet50.pt"
    save_untrained(path, name="resnet50", stride_in_1x1=True)
    result = run(path, "torchvision")
    check_failure(result, "other logits")
    assert "{'stride_in_1x1': True}" in result.err

    path = tmp_path / "resnet18b.pt"
    save_untrained(path, name="resnet18", stem="deep")
    result = run(path, "torchvision")
    check_failure(result, "it has no resnet18 {'stem': 'deep'}")


def fail_for_want_of_space(*_):
    raise OSError(errno.ENOSPC, "No space left")


@pytest.mark.slow
def test_failures_leave_nothing(checkpoint, run, monkeypatch):
    """Other logits, a full disk, a library that is missing, and a missing folder."""
    for difference in (1.1e-4, float("nan")):
        with monkeypatch.context() as patch:
            patch.setattr(export, "difference", lambda *_, value=difference: value)
            failed = run(checkpoint, "safetensors")
        check_failure(failed, "other logits")

    with monkeypatch.context() as patch:
        patch.setattr(export, "replace_file", fail_for_want_of_space)
        failed = run(checkpoint, "safetensors")
    check_failure(failed, "No space left")
    assert failed.err.count("\n") == 1

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    failed = run(checkpoint, "safetensors")
    check_failure(failed, "pip install 'resnet-dist[export]'")

    missing_folder = failed.file / "no" / "folder"
    failed = run(checkpoint, "safetensors", "--output", str(missing_folder))
    assert failed.code == 2
    assert failed.err.count("\n") == 1


def test_a_difference_is_seen():
    class Model(torch.nn.Module):
        scale = 10.0

        def forward(self, batch):
            return self.scale * batch.mean((2, 3))

    class Other(Model):
        def forward(self, batch):
            logits = super().forward(batch)
            if len(batch) > 1:
                logits = logits + 0.002
            return logits

    assert export.difference(Model(), Model(), 16) == 0
    # Of the largest logit, 20.
    assert 0.9e-4 < export.difference(Model(), Other(), 16) < 1.1e-4
    Model.scale = float("nan")
    assert not export.difference(Model(), Model(), 16) <= export.TOLERANCE
