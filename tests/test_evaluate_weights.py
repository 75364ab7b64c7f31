"""Evaluate, predict and export with weights of other programs, and on data sets with other classes.

`write_weights` makes networks that prefer the classes in a fixed order, whatever they see.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from class_preference import ORDER, SMALL, WNIDS, of_class, write_images, write_weights
from dist_utils import run_command
from image_files import OneProcess
from PIL import Image

import resnet_dist
from resnet_dist.api import EvaluationTransform
from resnet_dist.checkpoints.checkpoint import Saver
from resnet_dist.checkpoints.checkpoint_file import (
    read_checkpoint,
    unpack_checkpoint,
    write_checkpoint,
)
from resnet_dist.checkpoints.restore import StartPoint, restore
from resnet_dist.checkpoints.saved_network import open_weights
from resnet_dist.checkpoints.torchvision_weights import describe_weights, imagenet_words
from resnet_dist.commands.evaluate import hint_at_guessing
from resnet_dist.config import ModelConfig, to_dict
from resnet_dist.evaluation.evaluation_file import read_evaluation
from resnet_dist.evaluation.sets.classes import ClassMap, map_classes
from resnet_dist.models.build import build_model
from resnet_dist.models.class_names import BACKGROUND, assumed_names, words_of
from resnet_dist.models.resnet import Options, make_shortcut
from resnet_dist.settings.reading import build_config, config_from_dict

FAST = ("--distributed.threads", "1", "--data.threads", "1")


def published(monkeypatch, folder, name, model):
    """Let torchvision publish the weights of `model` under `name`, from a file of this machine."""
    new_path = folder / "new.pth"
    torch.save(model.state_dict(), new_path)
    # torchvision checks the digits in the name of the file against its content.
    digest = hashlib.sha256(new_path.read_bytes()).hexdigest()
    path = new_path.rename(folder / f"{name}-{digest[:8]}.pth")

    def hub_folder():
        return str(folder / "hub")

    def url(weights):
        return path.as_uri()

    monkeypatch.setattr(torch.hub, "get_dir", hub_folder)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "url", property(url))


def picture(path, size=(300, 260)):
    """A picture with edges, where filters differ."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (9, 11, 3), generator=generator, dtype=torch.uint8)
    small = Image.fromarray(pixels.numpy())
    enlarged = small.resize(size, Image.Resampling.NEAREST)
    enlarged.save(path)
    return path


def json_of(printed):
    """What a command with --json prints in its last line."""
    return json.loads(printed.splitlines()[-1])


def logits_of(network, image):
    """The logits of a loaded network for one image."""
    batch = network.transform(image)[None]
    return network.model(batch)


@pytest.mark.slow
def test_weights_of_torchvision(tmp_path, monkeypatch):
    """The logits are those of torchvision's network and transform, the words those of its
    metadata.
    """
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=1000).eval()
    published(monkeypatch, tmp_path, "resnet18", model)
    name = "torchvision:resnet18:IMAGENET1K_V1"
    image_path = picture(tmp_path / "a.png")

    # In Python.
    network = resnet_dist.load(name, device="cpu")
    assert network.class_names == WNIDS
    metadata = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    transform = metadata.transforms()
    image = Image.open(image_path)
    with torch.inference_mode():
        expected = model(transform(image)[None])
        found = logits_of(network, image)
    assert torch.allclose(found, expected, atol=1e-4)

    # By the command predict.
    best_class = int(expected.argmax())
    best_word = metadata.meta["categories"][best_class]
    predict = ("predict", image_path, "--weights", name, "--top", "1", *FAST)
    code, printed = run_command(tmp_path, predict)
    assert code == 0, printed
    assert printed.rstrip().endswith(f" %  {best_word}"), printed
    assert "resize 256, crop 224, bilinear, mean 0.485, 0.456, 0.406" in printed
    assert "from the weights' metadata" in printed
    assert (tmp_path / "hub/checkpoints").is_dir(), "kept where torchvision keeps it"

    # By the command export.
    output = tmp_path / "x.safetensors"
    export = ("export", "--weights", name, "--to", "safetensors", "--output", output)
    code, printed = run_command(tmp_path, export)
    assert code == 0, printed
    exported = open_weights(str(output))
    config = build_config(exported.settings)
    tensors = exported.fit(config).content["model"]
    assert torch.equal(tensors["fc.weight"], model.fc.weight)

    with pytest.raises(ValueError, match="no such weights, only torchvision:resnet18:IMAGENET1K"):
        open_weights("torchvision:resnet18:V7")


def test_the_transform_is_that_of_the_metadata(tmp_path):
    """Also a bicubic one, and networks that take back the normalisation."""
    image = Image.open(picture(tmp_path / "a.png"))
    bicubic = pixel_settings("efficientnet_b0:IMAGENET1K_V1")
    assert bicubic["data.val_interpolation"] == "bicubic"
    data = {key.removeprefix("data."): value for key, value in bicubic.items()}
    config = config_from_dict({"data": data})
    transform = EvaluationTransform(config.data)
    their_transform = torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
    assert torch.allclose(transform(image), their_transform(image), atol=1e-5)

    bilinear = pixel_settings("resnet50:IMAGENET1K_V2")
    assert bilinear["data.val_resize_size"] == 232
    assert bilinear["data.val_crop_size"] == 224
    for model in ("googlenet", "inception_v3"):
        settings = pixel_settings(f"{model}:IMAGENET1K_V1")
        assert settings["data.mean"] == (0.5, 0.5, 0.5)
        assert settings["data.std"] == (0.5, 0.5, 0.5)


def pixel_settings(name):
    """The settings of resizing, cropping and normalising that torchvision's metadata state."""
    return describe_weights(f"torchvision:{name}", "--weights").pixels


def test_the_wordnet_ids_are_those_of_timm():
    """A list that must be complete: compared with another source."""
    # timm is not imported, which takes seconds.
    [place] = importlib.util.find_spec("timm").submodule_search_locations
    folder = Path(place, "data", "_info")
    their_ids = (folder / "imagenet_synsets.txt").read_text().split()
    assert list(WNIDS) == their_ids

    lemmas = {}
    lemma_lines = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    for line in lemma_lines:
        wnid, lemma = line.split("\t")
        lemmas[wnid] = lemma.lower()
    words = imagenet_words()
    assert len(words) == 1000
    num_agreeing = 0
    for wnid, text in zip(WNIDS, words, strict=True):
        first_word, *_ = text.lower().split(",")
        if first_word in lemmas[wnid]:
            num_agreeing += 1
    assert num_agreeing > 900


@pytest.mark.slow
def test_heads_of_other_names_are_recognised_and_listed(tmp_path):
    weights = write_weights(tmp_path / "w.pth", 10, (7, 0))
    content = torch.load(weights, weights_only=True)
    config = config_from_dict({"model": {"name": "resnet20"}})
    for head in ("linear", "classifier", "head.fc", "last_linear", "output"):
        renamed = {}
        for key, value in content.items():
            if key.startswith("fc."):
                renamed[key.replace("fc.", f"{head}.")] = value
            else:
                renamed[f"module.{key}"] = value
        path = tmp_path / f"{head}.pth"
        torch.save({"state_dict": renamed}, path)
        saved = open_weights(str(path)).fit(config)
        assert saved.num_classes == 10
        biases = saved.content["model"]["fc.bias"]
        assert int(biases.argmax()) == 7, head
        remarks = " ".join(saved.remarks)
        assert f"{head}.bias -> fc.bias" in remarks, head


@pytest.mark.slow
def test_a_plain_file_needs_a_name_and_fitting_weights(tmp_path):
    path = write_weights(tmp_path / "w.pth", 1000, ORDER)
    wrong_models = (
        ({"name": ""}, "add --model.name, for instance --model.name resnet50"),
        ({"name": "resnet56"}, "--weights is '.*w.pth': it has 95 of the"),
        ({"name": "resnet20", "num_classes": 7}, "has 1000 classes: leave it out"),
    )
    for model, message in wrong_models:
        config = config_from_dict({"model": model})
        with pytest.raises(ValueError, match=message):
            open_weights(path).fit(config)
    no_tensors = tmp_path / "none.pth"
    torch.save({"a": 1}, no_tensors)
    with pytest.raises(ValueError, match="it has no tensors; name a checkpoint"):
        open_weights(str(no_tensors))

    # The command line.
    image = picture(tmp_path / "a.png", (8, 8))
    predict = ["predict", image, "--json", "--weights", path]
    assert SMALL[-2] == "--model.name"
    without_name = SMALL[:-2]
    wrong_words = (
        ([*predict, *without_name], "the file does not say which network it is"),
        ([*predict, "--checkpoint", path, *SMALL], "mean the same"),
    )
    for words, message in wrong_words:
        code, printed = run_command(tmp_path, words)
        errors = [line for line in printed.splitlines() if line.startswith("error")]
        assert code == 2, printed
        assert len(errors) == 1, printed
        assert message in errors[0], printed

    # ImageNet's words beside the ids.
    code, printed = run_command(tmp_path, [*predict, *SMALL])
    assert code == 0, printed
    first = json_of(printed)["predictions"][0]
    assert first["class"] == WNIDS[3]
    assert first["words"] == "tiger shark"


def load_small(path):
    """The network of a plain file of weights, as SMALL has it for commands."""
    changes = {
        "model.name": "resnet20",
        "data.val_resize_size": 8,
        "data.val_crop_size": 8,
    }
    return resnet_dist.load(path, device="cpu", changes=changes)


@pytest.mark.slow
def test_part_of_the_classes(tmp_path):
    """On two ranks in Python; the logits of absent classes are masked or kept."""
    path = write_weights(tmp_path / "w.pth", 1000, ORDER)
    folder = tmp_path / "a"
    write_images(folder, of_class(1, 3) + of_class(8, 1))

    def evaluate_in_python(arguments):
        """Under torchrun each process loads the network, and evaluates its share."""
        network = load_small(path)
        counts = resnet_dist.evaluate(network, folder, classes="present")
        return int(counts["correct1"] != 3)

    code, printed = run_command(tmp_path, [], world_size=2, entry=evaluate_in_python)
    assert code == 0, printed

    # Masked.
    evaluate = ["evaluate", "--weights", path, "--data", folder, "--json", *SMALL]
    details = tmp_path / "details.json"
    masked = [*evaluate, "--classes", "present", "--details", details]
    code, printed = run_command(tmp_path, masked)
    assert code == 0, printed
    # The report knows from the file that there is no top-5 accuracy.
    assert not read_evaluation(details).network.has_top5
    found = json_of(printed)
    assert found["model"]["correct1"] == 3
    assert found["num_classes"] == 2
    assert found["step"] is None
    assert "2 of the 1000 classes are present: the logits of the others are masked" in printed

    # Kept.
    code, printed = run_command(tmp_path, [*evaluate, "--classes", "all"])
    assert code == 0, printed
    found = json_of(printed)
    assert found["model"]["correct1"] == 0
    assert found["model"]["correct5"] == 4
    assert "the logits of the others are kept" in printed


@pytest.mark.slow
def test_evaluation_in_python_refuses_other_classes_without_a_choice(tmp_path):
    path = write_weights(tmp_path / "w.pth", 1000, ORDER)
    write_images(tmp_path / "a", of_class(1, 3) + of_class(8, 1))
    write_images(tmp_path / "b", ["n12345678/a.jpg", f"{WNIDS[0]}/b.jpg"])
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "a.jpg")

    def evaluate(arguments):
        network = load_small(path)
        counts = resnet_dist.evaluate(network, tmp_path / "a", classes="present")
        assert counts["top1"] == 75
        wrong = (
            ("a", "", "add --classes present"),
            ("b", "all", "1 classes that the network does not have .n12345678"),
            # A flat folder is found before the first image is read.
            ("flat", "all", "is flat, its 1 images"),
        )
        for folder, classes, message in wrong:
            with pytest.raises(ValueError, match=message):
                resnet_dist.evaluate(network, tmp_path / folder, classes=classes)
        return 0

    code, printed = run_command(tmp_path, [], entry=evaluate)
    assert code == 0, printed


def test_folders_named_by_numbers_are_class_ids():
    """Not places in the order of the text, in which 10 comes before 2."""
    numbers = sorted(str(number) for number in range(1000))
    found = map_classes(numbers, WNIDS, "", "v2")
    assert list(found.outputs) == [int(name) for name in numbers]
    assert "not in the order of the text" in found.remarks[0]
    with pytest.raises(ValueError, match="two folders for the same number"):
        map_classes(["1", "01"], WNIDS, "all", "val")
    from_one = [str(number) for number in range(1, 1001)]
    with pytest.raises(ValueError, match="count from 1"):
        map_classes(from_one, WNIDS, "", "val")
    # A network that was trained on such folders knows their names.
    own = ["0", "1", "10", "2"]
    found = map_classes(own, own, "", "val")
    assert found.remarks == ()


def test_a_network_with_a_background_class_counts_from_one():
    numbers = sorted(str(number) for number in range(1000))
    background = assumed_names(1001)
    assert background[0] == BACKGROUND
    shifted = map_classes(numbers, background, "present", "v2")
    assert list(shifted.outputs) == [int(name) + 1 for name in numbers]
    assert shifted.is_masked
    with pytest.raises(ValueError, match="not there: background"):
        map_classes(WNIDS, background, "", "val")


def test_classes_in_another_order_are_mapped_by_name():
    reverse = map_classes(WNIDS[::-1], WNIDS, "", "val")
    assert reverse.outputs[0] == 999
    assert "another order" in reverse.remarks[0]

    same = map_classes(WNIDS, WNIDS, "", "val")
    assert same == ClassMap(tuple(range(1000)), WNIDS, False)


@pytest.mark.slow
def test_an_accuracy_of_guessing_is_explained(checkpoint, digits, tmp_path):
    names = tuple(str(number) for number in range(100))
    class_map = ClassMap(tuple(range(100)), names, False)
    assert hint_at_guessing(3.0, class_map, 76.0) != []
    assert hint_at_guessing(3.1, class_map, 76.0) == []
    assert hint_at_guessing(1.0, class_map, None) == []
    assert hint_at_guessing(1.0, class_map, 2.0) == []

    # Weights whose logits are equal for all images: the accuracy is that of guessing.
    content = unpack_checkpoint(read_checkpoint(Path(checkpoint)), "")
    del content["sha256_in_zip_comment"]
    content["best_top1"] = 98.0
    for kind in ("model", "ema"):
        tensors = {key: value.clone() for key, value in content[kind].items()}
        tensors["fc.weight"].zero_()
        content[kind] = tensors
    one_of_each_class = tmp_path / "few"
    for folder in Path(digits, "val").iterdir():
        copied = one_of_each_class / folder.name
        copied.mkdir(parents=True)
        shutil.copy(min(folder.iterdir()), copied)
    path = tmp_path / "guess.pt"
    evaluate = ("evaluate", "--weights", path, "--data", one_of_each_class, "--json", *FAST)
    write_checkpoint(path, content)
    code, printed = run_command(tmp_path, evaluate)
    assert code == 0
    assert "hardly better than guessing among 10 classes" in printed
    assert "98.00 %" in printed

    # Logits that are not finite, though the weights are.
    content["model"]["fc.weight"].fill_(3e38)
    write_checkpoint(path, content)
    code, printed = run_command(tmp_path, evaluate)
    assert code == 2
    assert "logits are NaN or infinite" in printed
    assert "Traceback" not in printed

    # Weights that are not finite.
    content["model"]["fc.bias"][0] = torch.nan
    write_checkpoint(path, content)
    code, printed = run_command(tmp_path, evaluate)
    assert code == 2
    assert "values that are not finite in fc.bias" in printed


@pytest.mark.slow
def test_our_own_export_says_all(checkpoint, tmp_path):
    """Network, pixels and classes are in the .safetensors file."""
    output = tmp_path / "x.safetensors"
    export = ("export", "--weights", checkpoint, "--to", "safetensors", "--output", output)
    code, printed = run_command(tmp_path, export)
    assert code == 0, printed
    source = open_weights(str(checkpoint))
    opened = open_weights(str(output))
    config = build_config(opened.settings)
    own = build_config(source.settings)
    assert config.model.name == "resnet20"
    assert config.data.val_crop_size == 16
    assert config.data.mean == own.data.mean
    assert config.data.std == own.data.std
    saved = opened.fit(config)
    assert saved.class_names == source.class_names
    for key, value in source.content["ema"].items():
        assert torch.equal(saved.content["model"][key], value), key

    # Weights of another program are exported too. Names that nobody knows are not made up.
    foreign = write_weights(tmp_path / "w.pth", 3, (1,))
    output = tmp_path / "y.safetensors"
    export = ("export", "--weights", foreign, "--to", "safetensors", "--output", output, *SMALL)
    code, printed = run_command(tmp_path, export)
    assert code == 0, printed
    assert "model weights of w.pth; read back" in printed, printed
    exported = open_weights(str(output))
    saved = exported.fit(build_config(exported.settings))
    assert saved.class_names == []


@pytest.mark.slow
def test_both_layouts_of_shortcut_a(tmp_path):
    """The zeros are behind the channels, or on both sides as in the public CIFAR networks."""
    images = torch.randn(2, 16, 6, 6)
    subsampled = images[:, :, ::2, ::2]

    symmetric = make_shortcut(16, 32, 2, Options(shortcut="A_symmetric"))
    zeros_on_both_sides = F.pad(subsampled, (0, 0, 0, 0, 8, 8))
    assert torch.equal(symmetric(images), zeros_on_both_sides)

    shortcut_a = make_shortcut(16, 32, 2, Options(shortcut="A"))
    zeros_behind = F.pad(subsampled, (0, 0, 0, 0, 0, 16))
    assert torch.equal(shortcut_a(images), zeros_behind)


def test_weights_without_a_config_are_read_with_a_remark_about_the_layout(tmp_path):
    path = write_weights(tmp_path / "w.pth", 10, (7,))
    config = config_from_dict({"model": {"name": "resnet20"}})
    saved = open_weights(path).fit(config)
    remarks = " ".join(saved.remarks)
    assert "two layouts" in remarks
    assert "model.shortcut A_symmetric" in remarks

    with_projections = config_from_dict({"model": {"name": "resnet20", "shortcut": "B"}})
    with pytest.raises(ValueError, match="not all tensors fit"):
        open_weights(path).fit(with_projections)


def warnings_of_init_from(folder, shortcut, has_config):
    """What `restore` warns of the two layouts, from weights of a network with this shortcut.

    Args:
        folder: Where the file of weights is written.
        shortcut: The network's `model.shortcut`.
        has_config: Whether the file of weights has the config, too.
    """
    path = folder / "w.pt"
    model_settings = {"name": "resnet20", "shortcut": shortcut, "num_classes": 2}
    config = config_from_dict({"output_dir": str(folder), "model": model_settings})
    state = SimpleNamespace(model=build_model(config.model, 2), ema=None)
    content = {"model": state.model.state_dict()}
    if has_config:
        content["config"] = to_dict(config)
    torch.save(content, path)
    saver = Saver(folder, 1, {"class_names": ["a", "b"]}, print, is_main=True)
    log = Mock()
    start = StartPoint(weights_path=str(path))
    restore(state, start, config, saver, OneProcess(), log)
    texts = [call.args[0] for call in log.warn.call_args_list]
    return [text for text in texts if "two layouts" in text]


def test_init_from_warns_of_the_two_layouts_of_shortcut_a(tmp_path):
    """Unless the network pads no channels, or the config in the file tells which layout it is."""
    for shortcut in ("default", "A_symmetric"):
        warnings = warnings_of_init_from(tmp_path, shortcut, has_config=False)
        assert len(warnings) == 1, (shortcut, warnings)
        assert "set model.shortcut A_symmetric" in warnings[0]
    assert warnings_of_init_from(tmp_path, "B", has_config=False) == []
    assert warnings_of_init_from(tmp_path, "A", has_config=True) == []


def test_words_beside_the_data(tmp_path):
    path = tmp_path / "class_words.tsv"
    path.write_text("a\tan apple, fruit\n\nn01440764\tour fish\n")
    names = ["a", "b", WNIDS[0], WNIDS[1]]
    assert words_of(names, str(tmp_path)) == ["an apple, fruit", "b", "our fish", "goldfish"]
    assert words_of(["a", "b"]) == ["a", "b"]
    path.write_text("a an apple\n")
    with pytest.raises(ValueError, match=r"class_words.tsv, line 1: it must be a folder, a tab"):
        words_of(names, str(tmp_path))


@pytest.mark.slow
def test_names_of_a_network_that_has_none(tmp_path):
    """They are those of the data set, if there are as many; otherwise numbers."""
    path = write_weights(tmp_path / "w.pth", 3, (1,))
    config = config_from_dict({"model": {"name": "resnet20"}})
    saved = open_weights(path).fit(config)
    assert saved.names_or(("x", "y", "z")) == ["x", "y", "z"]
    assert saved.names_or(()) == ["class 0", "class 1", "class 2"]

    model = build_model(ModelConfig(name="resnet20"), saved.num_classes)
    assert model.fc.out_features == 3
