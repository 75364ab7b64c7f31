"""Weights from other libraries' files: every tensor is accounted for, and none is guessed."""

import argparse
import io
import sys
from collections import Counter

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_weights
from resnet_dist.checkpoints.torchvision_weights import download_weights
from resnet_dist.models import weights
from resnet_dist.models.build import MODELS
from resnet_dist.models.resnet import FAMILY
from resnet_dist.models.weights import (
    describe,
    find_weights,
    head_modules,
    load_weights,
)


def network(num_classes=5, name="resnet20"):
    """With values in every tensor that no fresh network has."""
    model = MODELS[name](num_classes=num_classes)
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.fill_(7)
    return model


def counts(rows):
    return [len(names) for names in rows.values()]


def assert_equal(model, state, but=()):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) != (key in but), key


def renamed(state, **names):
    """`state` under names with these prefixes in place of ours."""
    for ours, theirs in names.items():
        state = {
            theirs + key.removeprefix(ours) if key.startswith(ours) else key: value
            for key, value in state.items()
        }
    return state


NVIDIA = {f"layer{i + 1}.": f"layers.{i}." for i in range(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "number"),
    [
        ({}, 0),
        ({"": "module."}, 116),
        ({"": "module._orig_mod.module."}, 116),
        ({"": "model."}, 116),
        (NVIDIA, 108),
        ({"fc.": "head.fc."}, 2),
        ({"fc.": "last_linear."}, 2),
        ({"fc.": "classifier."}, 2),
        ({"fc.": "linear."}, 2),
        ({"fc.": "output."}, 2),
        ({"": "module.", "module.fc.": "module.linear."}, 116),
        ({"conv1.": "layer0.conv1."}, 1),
        ({**NVIDIA, "": "module."}, 116),
    ],
)
def test_names_of_other_layouts(names, number):
    """Each renamed key is in the table, and the values come over bit for bit."""
    source = network().state_dict()
    model = MODELS["resnet20"](num_classes=5)
    rows, whole = load_weights(model, {"state_dict": renamed(source, **names)}, "x.pth")
    assert_equal(model, source)
    assert whole
    assert counts(rows) == [len(source) - number, number, 0, 0, 0]
    assert number == 0 or all(" -> " in text for text in rows["renamed"])


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("state_dict",),
        ("model",),
        ("model_state",),
        ("model_state_dict",),
        ("net",),
        ("model", "state_dict"),
        ("ema",),
        ("state_dict_ema",),
        ("model_ema",),
    ],
)
def test_nesting(keys):
    """Averaged weights are taken before raw ones, and the keys that lead there are told."""
    source = content = network().state_dict()
    for key in reversed(keys):
        content = {"epoch": 3, "best": torch.tensor(1.0), key: content}
    if "ema" in "".join(keys):
        content |= {"state_dict": MODELS["resnet20"](num_classes=5).state_dict()}
    else:
        content = {**content, "ema": None, "model_ema": {"decay": 0.9}}
    found, state = find_weights(content)
    assert found == list(keys)
    assert all(state[key] is source[key] for key in source)
    assert find_weights({"epoch": 3}) == find_weights([1]) == ([], {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "seresnet50", "vgg11_bn", "densenet121", "inception_v3"]
)
def test_every_tensor_of_timm_has_its_place(name):
    """The names and shapes that timm gives today, without their values."""
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        own = MODELS[name]() if name in FAMILY else torchvision.models.get_model(name, **options)
        file = timm.create_model(name).state_dict()
    head = next(reversed(head_modules(own)))
    own = own.state_dict()
    places = [
        next(
            name
            for name in weights._candidates(key, head)
            if name in own and weights._fits(value, own[name])
        )
        for key, value in file.items()
    ]
    assert len(set(places)) == len(file)
    assert {key for key in own.keys() - set(places) if not key.startswith("AuxLogits.")} == set()


def test_the_torchvision_layout_is_ours():
    source = torchvision.models.resnet18(num_classes=3).state_dict()
    model = MODELS["resnet18"](num_classes=3)
    rows, whole = load_weights(model, source, "x.pth")
    assert whole
    assert counts(rows) == [122, 0, 0, 0, 0]
    assert_equal(model, source)


def test_layers_in_their_other_form():
    """Squeeze-and-excitation as NVIDIA has it, linear in 2019; timm's VGG, whose linear layers are
    convolutions.
    """

    def layers(conv):
        return (
            (nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)) if conv else (nn.Linear(8, 2), nn.Linear(2, 8))
        )

    for conv in (False, True):
        model = nn.Sequential(nn.Module(), nn.Linear(8, 3))
        model[0].se = nn.Module()
        model[0].se.fc1, model[0].se.fc2 = layers(True)
        squeeze, expand = layers(conv)
        head = nn.Linear(8, 3)
        file = {
            "0.squeeze.squeeze.weight": squeeze.weight,
            "0.squeeze.squeeze.bias": squeeze.bias,
            "0.squeeze.expand.weight": expand.weight,
            "0.squeeze.expand.bias": expand.bias,
            "1.weight": head.weight,
            "1.bias": head.bias,
        }
        rows, whole = load_weights(model, file, "x.pth")
        assert whole
        assert counts(rows) == ([2, 4, 0, 0, 0] if conv else [2, 2, 2, 0, 0])
        assert torch.equal(model[0].se.fc2.weight.flatten(1), expand.weight.flatten(1))
        assert conv or "0.squeeze.squeeze.weight -> 0.se.fc1.weight" in rows["reshaped"]
    model = nn.Module()
    model.classifier = nn.Sequential(
        nn.Linear(2 * 49, 6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 3),
    )
    parts = {
        "pre_logits.fc1.": nn.Conv2d(2, 6, 7),
        "pre_logits.fc2.": nn.Conv2d(6, 6, 1),
        "head.fc.": nn.Linear(6, 3),
    }
    file = {
        prefix + key: value
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }
    assert counts(load_weights(model, file, "x.pth")[0]) == [0, 4, 2, 0, 0]
    image = torch.randn(4, 2, 7, 7)
    hidden = parts["pre_logits.fc2."](parts["pre_logits.fc1."](image).relu()).relu().flatten(1)
    torch.testing.assert_close(model.classifier.eval()(image.flatten(1)), parts["head.fc."](hidden))


def test_old_densenet_names():
    """Those of torchvision's files of 2017, which its own loader mends."""
    model = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    source = {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    old = {
        key.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2."): value
        for key, value in source.items()
        if "num_batches" not in key
    }
    assert old.keys() != source.keys()
    rows, whole = load_weights(model, old, "x.pth")
    assert whole
    assert counts(rows)[2:4] == [0, 0]
    assert len(rows["renamed"]) == 40
    assert all(text.endswith("num_batches_tracked (without effect)") for text in rows["missing"])
    assert_equal(
        model,
        {**model.state_dict(), **{key: source[key] for key in source if "num_batches" not in key}},
    )


def test_a_head_is_recognised_by_position_and_shape_alone():
    """With other classes it is known to be the head; another layer is not taken for it."""
    source = renamed(network(10).state_dict(), **{"fc.": "linear."})
    rows, whole = load_weights(MODELS["resnet20"](num_classes=2), source, "x.pth")
    assert whole
    assert rows["skipped"] == [
        "linear.weight [10, 64] instead of [2, 64]",
        "linear.bias [10] instead of [2]",
    ]
    source["projection.weight"] = torch.zeros(10, 7)
    rows, whole = load_weights(MODELS["resnet20"](num_classes=10), source, "x.pth")
    assert not whole
    assert "projection.weight [10, 7]" in rows["skipped"]


def test_another_number_of_classes_means_a_fresh_head():
    source = network(10).state_dict()
    model = MODELS["resnet20"](num_classes=2)
    fresh = model.fc.weight.detach().clone(), model.fc.bias.detach().clone()
    rows, whole = load_weights(model, source, "x.pth")
    assert whole
    assert counts(rows) == [114, 0, 0, 2, 2]
    assert rows["skipped"] == [
        "fc.weight [10, 64] instead of [2, 64]",
        "fc.bias [10] instead of [2]",
    ]
    assert rows["missing"] == [
        f"fc.{kind} (head, freshly initialised)" for kind in ("weight", "bias")
    ]
    assert torch.equal(model.fc.weight, fresh[0])
    assert torch.equal(model.fc.bias, fresh[1])
    assert_equal(model, source | {"fc.weight": fresh[0], "fc.bias": fresh[1]})


def test_some_tensors_that_do_not_fit_are_told():
    source = network().state_dict()
    source["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3)
    source["bn1.bias"] = torch.zeros(16, dtype=torch.int64)
    source["extra"] = 3
    del source["layer3.2.bn2.running_var"], source["layer3.2.bn2.num_batches_tracked"]
    rows, whole = load_weights(MODELS["resnet20"](num_classes=5), source, "x.pth")
    assert not whole
    assert counts(rows) == [112, 0, 0, 3, 4]
    assert rows["skipped"] == [
        "bn1.bias [16] instead of [16]",
        "layer1.0.conv1.weight [1, 2, 3] instead of [16, 16, 3, 3]",
        "extra ['int']",
    ]
    assert rows["missing"] == [
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer3.2.bn2.running_var",
        "layer3.2.bn2.num_batches_tracked (without effect)",
    ]
    table = describe(rows).splitlines()
    assert [line.split()[:2] for line in table] == [
        [kind, str(len(names))] for kind, names in rows.items()
    ]
    assert "layer3.2.bn2.running_var and 1 more" in table[4]


def test_half_of_the_backbone_is_the_least():
    """By the tensors of the network that is to be trained, without its head and the counts of its
    norms.
    """
    source = network().state_dict()
    model = MODELS["resnet20"](num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for content in ({}, {"model": {}}, {"a.b": torch.zeros(3)}, {"fc.weight": source["fc.weight"]}):
        with pytest.raises(
            ValueError, match=r"'x\.pth'.* of the 95 tensors .*conv1\.weight, .*model\.name"
        ):
            load_weights(model, content, "x.pth")
    assert_equal(model, before)
    needed = [key for key in source if "fc." not in key and "num_batches" not in key]
    with pytest.raises(ValueError, match="it has 47 of the 95"):
        load_weights(model, {key: source[key] for key in needed[:47]}, "x.pth")
    assert not load_weights(model, {key: source[key] for key in needed[:48]}, "x.pth")[1]


def test_values_that_are_not_finite_are_refused():
    source = network().state_dict()
    model = MODELS["resnet20"](num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    source["layer2.0.bn1.running_var"][3] = float("inf")
    with pytest.raises(ValueError, match=r"not finite in layer2\.0\.bn1\.running_var"):
        load_weights(model, source, "x.pth")
    assert_equal(model, before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files(tmp_path, suffix):
    """Half precision becomes single, without loss; what is cut off is damaged."""
    source = {
        key: value.half() if value.is_floating_point() else value
        for key, value in network().state_dict().items()
    }
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch.save({"epoch": 1, "args": argparse.Namespace(lr=0.1), "state_dict": source}, path)
    else:
        safetensors.torch.save_file(source, path)
    model = MODELS["resnet20"](num_classes=5)
    payload = read_checkpoint(path)
    assert load_weights(model, unpack_weights(payload, str(path)), str(path))[1]
    assert model.fc.weight.dtype == torch.float32
    assert_equal(model, {key: value.float() for key, value in source.items()})
    for damaged in (payload[: len(payload) // 2], b"", b"\0" * 100):
        with pytest.raises(ValueError, match=rf"x\.{suffix} is damaged, or no file of"):
            unpack_weights(damaged, str(path))


def test_objects_are_not_loaded(monkeypatch):
    """Python objects could run any code: of them only argparse's settings are let through."""
    buffer = io.BytesIO()
    torch.save({"state_dict": network().state_dict(), "best": Counter("a"), "run": print}, buffer)
    with pytest.raises(
        ValueError, match=r"x\.pth needs Python objects \(\S+\).*not loaded.*'weights\.pth'"
    ):
        unpack_weights(buffer.getvalue(), "x.pth")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"needs safetensors: pip install 'resnet-dist\[export\]'"):
        unpack_weights(b"", "x.safetensors")


def test_the_head_is_found_by_structure():
    """Never by its name, also where linear layers before it have as many outputs."""

    def heads(model, auxiliary=False):
        if auxiliary:
            model.auxiliary_weight = 0.3
        return list(head_modules(model))

    models = torchvision.models
    with torch.device("meta"):
        for builder, classes, expected in (
            (MODELS["resnet20"], 10, "fc"),
            (models.alexnet, 4096, "classifier.6"),
            (models.vgg11, 4096, "classifier.6"),
            (models.densenet121, 10, "classifier"),
            (models.efficientnet_b0, 10, "classifier.1"),
        ):
            assert heads(builder(num_classes=classes)) == [expected]
        googlenet, inception = (
            builder(num_classes=1024, init_weights=False, aux_logits=True)
            for builder in (models.googlenet, models.inception_v3)
        )
    assert heads(googlenet) == ["fc"]
    assert heads(googlenet, auxiliary=True) == ["aux1.fc2", "aux2.fc2", "fc"]
    assert heads(inception, auxiliary=True) == ["AuxLogits.fc", "fc"]
    assert heads(nn.Conv2d(1, 1, 1)) == []


def test_downloads_that_cannot_be_had(tmp_path, monkeypatch):
    """The way of a whole run, on two ranks: tests/dist/test_transfer.py. Here files stand for the
    network.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "torchvision:resnet50:IMAGENET1K_V2"
    path = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    url = "file:///"
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "url", property(lambda weights: url + path.name)
    )
    with pytest.raises(ValueError, match=rf"'{name}'.*could not be had.*no network.*{path}"):
        download_weights(name)
    url = f"{tmp_path.as_uri()}/"
    torch.save({"a": torch.zeros(2)}, tmp_path / path.name)
    with pytest.raises(ValueError, match="could not be had .invalid hash value"):
        download_weights(name)
    torch.save({"a": torch.zeros(2)}, path)  # a download that the disk has spoilt since
    with pytest.raises(ValueError, match=rf"{path} is damaged.*delete it"):
        download_weights(name)
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"could not be had.*{path}"):
        download_weights(name)
    for wrong in ("torchvision:resnet50:V9", "torchvision:resnet50"):
        with pytest.raises(
            ValueError, match=rf"'{wrong}'.*torchvision:resnet50:IMAGENET1K_V1, {name}"
        ):
            download_weights(wrong)
    with pytest.raises(ValueError, match="those of its own models"):
        download_weights("torchvision:resnet20:IMAGENET1K_V1")
