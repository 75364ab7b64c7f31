"""Weights from other libraries' files: every tensor is accounted for, and none is guessed."""

import argparse
import copy
import io
import re
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
            numbers = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(numbers + 0.5)
        else:
            tensor.fill_(7)
    return model


def fresh_network(num_classes=5):
    """The network to load weights into."""
    return MODELS["resnet20"](num_classes=num_classes)


def counts(rows):
    """Numbers of tensors: exact, renamed, reshaped, skipped, missing."""
    return [len(names) for names in rows.values()]


def assert_equal(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def renamed(state, **prefixes):
    """`state` under names with these prefixes in place of ours, one after the other."""
    for ours, theirs in prefixes.items():
        changed = {}
        for key, value in state.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
            changed[key] = value
        state = changed
    return state


NVIDIA = {
    "layer1.": "layers.0.",
    "layer2.": "layers.1.",
    "layer3.": "layers.2.",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefixes", "num_renamed"),
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
def test_names_of_other_layouts(prefixes, num_renamed):
    """Each renamed key is in the table, and the values come over bit for bit."""
    source = network().state_dict()
    num_exact = len(source) - num_renamed
    model = fresh_network()
    content = {"state_dict": renamed(source, **prefixes)}

    rows, whole = load_weights(model, content, "x.pth")

    assert_equal(model, source)
    assert whole
    assert counts(rows) == [num_exact, num_renamed, 0, 0, 0]
    for text in rows["renamed"]:
        assert " -> " in text


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
    source = network().state_dict()
    content = source
    for key in reversed(keys):
        content = {
            "epoch": 3,
            "best": torch.tensor(1.0),
            key: content,
        }
    is_average = any("ema" in key for key in keys)
    if is_average:
        raw_weights = fresh_network().state_dict()
        content = {**content, "state_dict": raw_weights}
    else:
        content = {**content, "ema": None, "model_ema": {"decay": 0.9}}

    found, state = find_weights(content)

    assert found == list(keys)
    for key, tensor in source.items():
        assert state[key] is tensor


def test_no_weights_are_found():
    assert find_weights({"epoch": 3}) == ([], {})
    assert find_weights([1]) == ([], {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "seresnet50", "vgg11_bn", "densenet121", "inception_v3"]
)
def test_every_tensor_of_timm_has_its_place(name):
    """The names and shapes that timm gives today, without their values."""
    with torch.device("meta"):
        if name in FAMILY:
            model = MODELS[name]()
        elif name == "inception_v3":
            model = torchvision.models.inception_v3(init_weights=False)
        else:
            model = torchvision.models.get_model(name)
        file = timm.create_model(name).state_dict()
    *_, head = head_modules(model)
    state = model.state_dict()

    def place_of(key, tensor):
        for candidate in weights._candidates(key, head):
            if candidate in state and weights._fits(tensor, state[candidate]):
                return candidate
        raise AssertionError(f"{key} has no place")

    places = {place_of(key, tensor) for key, tensor in file.items()}
    assert len(places) == len(file)

    empty = state.keys() - places
    for key in empty:
        # timm's file has no auxiliary head.
        assert key.startswith("AuxLogits.")


def test_the_torchvision_layout_is_ours():
    source = torchvision.models.resnet18(num_classes=3).state_dict()
    model = MODELS["resnet18"](num_classes=3)
    rows, whole = load_weights(model, source, "x.pth")
    assert whole
    assert counts(rows) == [122, 0, 0, 0, 0]
    assert_equal(model, source)


def file_of(modules):
    """The tensors of {name: module}, as a file has them."""
    file = {}
    for name, module in modules.items():
        state = module.state_dict(prefix=f"{name}.")
        file.update(state)
    return file


@pytest.mark.parametrize("is_conv", [False, True])
def test_squeeze_and_excitation_of_nvidia(is_conv):
    """Two linear layers in its files of 2019, convolutions later."""
    excitation = nn.Module()
    excitation.fc1 = nn.Conv2d(8, 2, 1)
    excitation.fc2 = nn.Conv2d(2, 8, 1)
    block = nn.Module()
    block.se = excitation
    model = nn.Sequential(block, nn.Linear(8, 3))

    squeeze = nn.Linear(8, 2)
    expand = nn.Linear(2, 8)
    if is_conv:
        squeeze = nn.Conv2d(8, 2, 1)
        expand = nn.Conv2d(2, 8, 1)
    modules = {
        "0.squeeze.squeeze": squeeze,
        "0.squeeze.expand": expand,
        "1": nn.Linear(8, 3),
    }

    rows, whole = load_weights(model, file_of(modules), "x.pth")

    assert whole
    loaded = excitation.fc2.weight.flatten(1)
    assert torch.equal(loaded, expand.weight.flatten(1))
    if is_conv:
        assert counts(rows) == [2, 4, 0, 0, 0]
    else:
        assert counts(rows) == [2, 2, 2, 0, 0]
        assert "0.squeeze.squeeze.weight -> 0.se.fc1.weight" in rows["reshaped"]


def test_linear_layers_of_timms_vgg_are_convolutions():
    classifier = nn.Sequential(
        nn.Linear(2 * 49, 6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 3),
    )
    model = nn.Module()
    model.classifier = classifier
    fc1 = nn.Conv2d(2, 6, 7)
    fc2 = nn.Conv2d(6, 6, 1)
    head = nn.Linear(6, 3)
    modules = {
        "pre_logits.fc1": fc1,
        "pre_logits.fc2": fc2,
        "head.fc": head,
    }

    rows, _ = load_weights(model, file_of(modules), "x.pth")

    assert counts(rows) == [0, 4, 2, 0, 0]
    maps = torch.randn(4, 2, 7, 7)
    hidden = torch.relu(fc1(maps))
    hidden = torch.relu(fc2(hidden))
    expected = head(hidden.flatten(1))
    classifier.eval()
    logits = classifier(maps.flatten(1))
    torch.testing.assert_close(logits, expected)


def test_old_densenet_names():
    """Those of torchvision's files of 2017, which its own loader mends."""
    model = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    source = {}
    for key, tensor in model.state_dict().items():
        if "num_batches" not in key:
            source[key] = torch.rand_like(tensor)
    old = {}
    for key, tensor in source.items():
        # norm1.weight was norm.1.weight.
        old_key = re.sub(r"(norm|conv)([12])\.", r"\1.\2.", key)
        old[old_key] = tensor
    assert old.keys() != source.keys()

    rows, whole = load_weights(model, old, "x.pth")

    assert whole
    assert len(rows["renamed"]) == 40
    assert rows["reshaped"] == []
    assert rows["skipped"] == []
    for text in rows["missing"]:
        assert text.endswith("num_batches_tracked (without effect)")
    loaded = model.state_dict()
    for key, tensor in source.items():
        assert torch.equal(loaded[key], tensor), key


def test_a_head_is_recognised_by_position_and_shape_alone():
    """With other classes it is known to be the head; another layer is not taken for it."""
    other_names = {"fc.": "linear."}
    source = renamed(network(10).state_dict(), **other_names)

    rows, whole = load_weights(fresh_network(2), source, "x.pth")
    assert whole
    assert rows["skipped"] == [
        "linear.weight [10, 64] instead of [2, 64]",
        "linear.bias [10] instead of [2]",
    ]

    source["projection.weight"] = torch.zeros(10, 7)
    rows, whole = load_weights(fresh_network(10), source, "x.pth")
    assert not whole
    assert "projection.weight [10, 7]" in rows["skipped"]


def test_another_number_of_classes_means_a_fresh_head():
    source = network(10).state_dict()
    model = fresh_network(2)
    fresh_weight = model.fc.weight.detach().clone()
    fresh_bias = model.fc.bias.detach().clone()

    rows, whole = load_weights(model, source, "x.pth")

    assert whole
    assert counts(rows) == [114, 0, 0, 2, 2]
    assert rows["skipped"] == [
        "fc.weight [10, 64] instead of [2, 64]",
        "fc.bias [10] instead of [2]",
    ]
    assert rows["missing"] == [
        "fc.weight (head, freshly initialised)",
        "fc.bias (head, freshly initialised)",
    ]
    expected = {
        **source,
        "fc.weight": fresh_weight,
        "fc.bias": fresh_bias,
    }
    assert_equal(model, expected)


def test_some_tensors_that_do_not_fit_are_told():
    source = network().state_dict()
    source["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3)
    source["bn1.bias"] = torch.zeros(16, dtype=torch.int64)
    source["extra"] = 3
    del source["layer3.2.bn2.running_var"]
    del source["layer3.2.bn2.num_batches_tracked"]

    rows, whole = load_weights(fresh_network(), source, "x.pth")

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

    lines = describe(rows).splitlines()
    for line, (kind, names) in zip(lines, rows.items(), strict=True):
        first_word, second_word, *_ = line.split()
        assert first_word == kind
        assert int(second_word) == len(names)
    line_of_missing = lines[-1]
    assert "layer3.2.bn2.running_var and 1 more" in line_of_missing


def test_half_of_the_backbone_is_the_least():
    """By the tensors of the network that is to be trained, without its head and the counts of its
    norms.
    """
    source = network().state_dict()
    model = fresh_network()
    before = copy.deepcopy(model.state_dict())
    message = r"'x\.pth'.* of the 95 tensors .*conv1\.weight, .*model\.name"
    contents = (
        {},
        {"model": {}},
        {"a.b": torch.zeros(3)},
        {"fc.weight": source["fc.weight"]},
    )
    for content in contents:
        with pytest.raises(ValueError, match=message):
            load_weights(model, content, "x.pth")
    assert_equal(model, before)

    backbone = []
    for key, tensor in source.items():
        if "fc." not in key and "num_batches" not in key:
            backbone.append((key, tensor))
    too_few = dict(backbone[:47])
    with pytest.raises(ValueError, match="it has 47 of the 95"):
        load_weights(model, too_few, "x.pth")

    just_enough = dict(backbone[:48])
    _, whole = load_weights(model, just_enough, "x.pth")
    assert not whole


def test_values_that_are_not_finite_are_refused():
    source = network().state_dict()
    source["layer2.0.bn1.running_var"][3] = float("inf")
    model = fresh_network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"not finite in layer2\.0\.bn1\.running_var"):
        load_weights(model, source, "x.pth")
    assert_equal(model, before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files(tmp_path, suffix):
    """Half precision becomes single, without loss; what is cut off is damaged."""
    source = network().half().state_dict()
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        content = {
            "epoch": 1,
            "args": argparse.Namespace(lr=0.1),
            "state_dict": source,
        }
        torch.save(content, path)
    else:
        safetensors.torch.save_file(source, path)
    payload = read_checkpoint(path)

    model = fresh_network()
    content = unpack_weights(payload, str(path))
    _, whole = load_weights(model, content, str(path))

    assert whole
    assert model.fc.weight.dtype == torch.float32
    for key, tensor in model.state_dict().items():
        expected = source[key].to(tensor.dtype)
        assert torch.equal(tensor, expected), key

    first_half = payload[: len(payload) // 2]
    zeros = b"\0" * 100
    for damaged in (first_half, b"", zeros):
        with pytest.raises(ValueError, match=rf"x\.{suffix} is damaged, or no file of"):
            unpack_weights(damaged, str(path))


def test_objects_are_not_loaded(monkeypatch):
    """Python objects could run any code: of them only argparse's settings are let through."""
    content = {
        "state_dict": network().state_dict(),
        "best": Counter("a"),
        "run": print,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    message = r"x\.pth needs Python objects \(\S+\).*not loaded.*'weights\.pth'"
    with pytest.raises(ValueError, match=message):
        unpack_weights(buffer.getvalue(), "x.pth")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"needs safetensors: pip install 'resnet-dist\[export\]'"):
        unpack_weights(b"", "x.safetensors")


def test_the_head_is_found_by_structure():
    """Never by its name, also where linear layers before it have as many outputs."""
    models = torchvision.models
    with torch.device("meta"):
        cases = (
            (MODELS["resnet20"](num_classes=10), "fc"),
            (models.alexnet(num_classes=4096), "classifier.6"),
            (models.vgg11(num_classes=4096), "classifier.6"),
            (models.densenet121(num_classes=10), "classifier"),
            (models.efficientnet_b0(num_classes=10), "classifier.1"),
        )
    for model, expected in cases:
        assert list(head_modules(model)) == [expected]

    without_linear_layer = nn.Conv2d(1, 1, 1)
    assert list(head_modules(without_linear_layer)) == []


def test_auxiliary_heads_count_where_their_loss_counts():
    options = {
        "num_classes": 1024,
        "init_weights": False,
        "aux_logits": True,
    }
    with torch.device("meta"):
        googlenet = torchvision.models.googlenet(**options)
        inception = torchvision.models.inception_v3(**options)
    assert list(head_modules(googlenet)) == ["fc"]
    googlenet.auxiliary_weight = 0.3
    assert list(head_modules(googlenet)) == ["aux1.fc2", "aux2.fc2", "fc"]
    inception.auxiliary_weight = 0.3
    assert list(head_modules(inception)) == ["AuxLogits.fc", "fc"]


def test_downloads_that_cannot_be_had(tmp_path, monkeypatch):
    """The way of a whole run, on two ranks: tests/dist/test_transfer.py. Here files stand for the
    network.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "torchvision:resnet50:IMAGENET1K_V2"
    path = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth"
    other_weights = {"a": torch.zeros(2)}

    def download_from(url):
        enum = torchvision.models._api.WeightsEnum
        monkeypatch.setattr(enum, "url", property(lambda weights: url))
        return download_weights(name)

    # The address has no file.
    nowhere = f"file:///{path.name}"
    with pytest.raises(ValueError, match=rf"'{name}'.*could not be had.*no network.*{path}"):
        download_from(nowhere)

    # It has another file.
    other_file = tmp_path / path.name
    torch.save(other_weights, other_file)
    with pytest.raises(ValueError, match="could not be had .invalid hash value"):
        download_from(other_file.as_uri())

    # A download that the disk has spoilt since.
    torch.save(other_weights, path)
    with pytest.raises(ValueError, match=rf"{path} is damaged.*delete it"):
        download_from(other_file.as_uri())
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"could not be had.*{path}"):
        download_from(other_file.as_uri())

    # Names that torchvision does not know.
    for wrong in ("torchvision:resnet50:V9", "torchvision:resnet50"):
        message = rf"'{wrong}'.*torchvision:resnet50:IMAGENET1K_V1, {name}"
        with pytest.raises(ValueError, match=message):
            download_weights(wrong)
    with pytest.raises(ValueError, match="those of its own models"):
        download_weights("torchvision:resnet20:IMAGENET1K_V1")
