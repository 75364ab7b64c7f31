"""Exports of a checkpoint: each computes what the checkpoint computes, in the program it is for."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import (
    read_checkpoint,
    unpack_checkpoint,
    write_checkpoint,
)
from resnet_dist.checkpoints.saved_network import load_network, open_network
from resnet_dist.commands import export
from resnet_dist.config import Config, DataConfig, ModelConfig, to_dict
from resnet_dist.models.build import build_model


@pytest.fixture
def run(tmp_path, capfd):
    """Export a checkpoint: exit code, the file, and what was printed on the two streams."""

    def run(checkpoint, to, *more):
        output = tmp_path / f"exported.{to}"
        code = cli.main(
            ["export", "--checkpoint", str(checkpoint), "--to", to, "--output", str(output), *more]
        )
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return code, output, *capfd.readouterr()

    return run


def network(checkpoint, raw=False):
    saved = open_network(Path(checkpoint))
    config = Config(model=ModelConfig("resnet20"))
    return load_network(saved, config, torch.device("cpu"), raw)[0]


def images(n):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


def check_metadata(facts, checkpoint):
    digest = Path(checkpoint).resolve().with_suffix(".pt.sha256").read_text().split()[0]
    assert facts["model"] == "resnet20"
    assert facts["weights"] == "ema"
    assert facts["checkpoint_sha256"] == digest
    assert json.loads(facts["class_names"]) == list("0123456789")
    assert json.loads(facts["mean"]) == [
        0.5,
        0.5,
        0.5,
    ]
    assert [json.loads(facts[key]) for key in ("val_resize_size", "val_crop_size", "step")] == [
        18,
        16,
        2,
    ]


@pytest.mark.slow
@torch.inference_mode()
def test_onnx(checkpoint, run):
    import onnxruntime

    code, output, out, err = run(checkpoint, "onnx")
    assert code == 0
    assert err == ""
    assert out.count("\n") == 1
    assert f"{output}: resnet20, ema weights of step 2" in out
    session = onnxruntime.InferenceSession(output)
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    assert session.get_outputs()[0].shape == ["batch", 10]
    model = network(checkpoint)
    for n in (1, 7):
        [logits] = session.run(["logits"], {"images": images(n).numpy()})
        np.testing.assert_allclose(logits, model(images(n)).numpy(), atol=1e-4)
    check_metadata(session.get_modelmeta().custom_metadata_map, checkpoint)


@pytest.mark.slow
@torch.inference_mode()
def test_torch_export(checkpoint, run):
    code, output, out, err = run(
        checkpoint, "torch_export", "--raw_weights", "--data.val_crop_size", "12"
    )
    assert code == 0
    assert err == ""
    assert out.count("\n") == 1
    assert "model weights of step 2" in out
    facts = {"metadata.json": ""}
    with open(output, "rb") as file:
        program = torch.export.load(file, extra_files=facts)
    facts = json.loads(facts["metadata.json"])
    assert facts["weights"] == "model"
    assert facts["val_crop_size"] == "12"
    for n in (1, 7):
        given = images(n)[:, :, :12, :12]
        torch.testing.assert_close(
            program.module()(given), network(checkpoint, raw=True)(given), atol=1e-5, rtol=0
        )


@pytest.mark.slow
def test_safetensors(checkpoint, run):
    from safetensors import safe_open

    code, output, out, err = run(checkpoint, "safetensors")
    assert code == 0
    assert err == ""
    assert out.count("\n") == 1
    weights = unpack_checkpoint(read_checkpoint(checkpoint), "")["ema"]
    with safe_open(output, "pt") as file:
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(name), weights[name]) for name in weights)
        check_metadata(file.metadata(), checkpoint)
    before = output.read_bytes()
    code, output, _, err = run(checkpoint, "safetensors")  # which would be written over
    assert code == 2
    assert "exists" in err
    assert output.read_bytes() == before


def fresh(path, **options):
    """A checkpoint of a network that was never trained."""
    config = Config(model=ModelConfig(num_classes=4, **options), data=DataConfig(val_crop_size=32))
    torch.manual_seed(0)
    model = build_model(config.model, 4).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    write_checkpoint(
        path,
        {
            "format": 1,
            "config": to_dict(config),
            "class_names": list("abcd"),
            "step": 1,
            "ema": None,
            "model": model.state_dict(),
        },
    )
    return path, model.eval()


@pytest.mark.slow
@torch.inference_mode()
def test_torchvision(tmp_path, run, checkpoint):
    import torchvision

    path, model = fresh(tmp_path / "resnet18.pt", name="resnet18", zero_init_residual=True)
    code, output, out, err = run(path, "torchvision")
    assert code == 0
    assert err == ""
    assert out.count("\n") == 1
    theirs = torchvision.models.resnet18(num_classes=4)
    theirs.load_state_dict(torch.load(output, weights_only=True), strict=True)
    torch.testing.assert_close(theirs.eval()(images(3)), model(images(3)), atol=1e-5, rtol=0)
    output.unlink()

    code, output, _, err = run(checkpoint, "torchvision")
    assert code == 2
    assert "it has no resnet20: take onnx, torch_export or safetensors" in err
    assert not output.exists()
    # Of the same keys and shapes, and another network: only the logits tell.
    path, _ = fresh(tmp_path / "resnet50.pt", name="resnet50", stride_in_1x1=True)
    code, output, _, err = run(path, "torchvision")
    assert code == 2
    assert "other logits" in err
    assert "{'stride_in_1x1': True}" in err
    assert not output.exists()
    path, _ = fresh(tmp_path / "resnet18b.pt", name="resnet18", stem="deep")
    code, output, _, err = run(path, "torchvision")
    assert code == 2
    assert "it has no resnet18 {'stem': 'deep'}" in err
    assert not output.exists()


def fail_for_want_of_space(*_):
    raise OSError(errno.ENOSPC, "No space left")


@pytest.mark.slow
def test_failures_leave_nothing(checkpoint, run, monkeypatch):
    for difference in (1.1e-4, float("nan")):
        with monkeypatch.context() as patch:
            patch.setattr(export, "difference", lambda *_, value=difference: value)
            code, output, _, err = run(checkpoint, "safetensors")
        assert code == 2
        assert "other logits" in err
        assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(export, "replace_file", fail_for_want_of_space)
        code, output, _, err = run(checkpoint, "safetensors")
    assert code == 2
    assert "No space left" in err
    assert err.count("\n") == 1
    assert not output.exists()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, output, _, err = run(checkpoint, "safetensors")
    assert code == 2
    assert "pip install 'resnet-dist[export]'" in err
    assert not output.exists()
    code, _, _, err = run(checkpoint, "safetensors", "--output", str(output / "no" / "folder"))
    assert code == 2
    assert err.count("\n") == 1


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
