"""The suite on miniature copies of all data sets in their official layouts, with results computed
by hand.

The networks prefer the classes in a fixed order, whatever they see: a class is a hit if it is the
first one of the order among those that compete.
"""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from class_preference import ORDER, SMALL, WNIDS, of_class, write_images, write_weights
from dist_utils import run_command
from image_files import OneProcess
from PIL import Image

from resnet_dist.api import EvaluationTransform
from resnet_dist.commands import evaluate_suite
from resnet_dist.config import Config, DataConfig
from resnet_dist.evaluation.sets import arrays, corruptions
from resnet_dist.evaluation.sets.suite_file import SuiteEntry, read_suite
from resnet_dist.evaluation.sets.suite_results import PartCounts, SetResult

# Batches of three images.
THREES = ("--data.val_batch_size", "3")


def few_corruptions(monkeypatch, names=("snow", "fog")):
    """Keep two corruptions: 10 parts instead of 75 take less time."""
    for name in list(corruptions.ALEXNET_ERRORS):
        if name not in names:
            monkeypatch.delitem(corruptions.ALEXNET_ERRORS, name)


def run_suite(weights, suite, output, *options, world_size=1):
    """Evaluate the suite; returns the exit code and what was printed."""
    words = ["evaluate", "--weights", weights, "--suite", suite, "--output", output]
    return run_command(output.parent, [*words, *SMALL, *options], world_size)


def read_results(output):
    """The results of the sets in suite.json: {name of the set: entry}."""
    content = json.loads((output / "suite.json").read_text())
    return content["sets"]


def figures_of(output):
    """The figures in suite.json: {name of the set: figures}."""
    return {name: entry["figures"] for name, entry in read_results(output).items()}


@pytest.fixture(scope="module")
def imagenets(tmp_path_factory):
    """Miniature copies of the data sets with ImageNet's classes, weights and a suite."""
    place = tmp_path_factory.mktemp("imagenets")
    # ILSVRC 2012: the numbers of the files are those of real.json.
    names = []
    for number, label in enumerate((3, 3, 1, 8, 2), start=1):
        names.append(f"val/{WNIDS[label]}/ILSVRC2012_val_{number:08d}.JPEG")
    write_images(place / "imagenet", names)
    # The network says 3: right for images 1 and 3; image 4 has no label and does not count.
    labels = [
        [3],
        [1],
        [1, 3],
        [],
        [2],
    ]
    (place / "real.json").write_text(json.dumps(labels))
    # Folders are class ids. As text 10 comes before 3.
    write_images(place / "v2", ["10/a.jpeg", "3/b.jpeg", "3/c.jpeg", "2/d.jpeg"])
    # Class 3, which the network prefers, is not in this set. If its logits are masked, class 1
    # wins; otherwise class 3 does, and all images are wrong.
    write_images(place / "a", of_class(1, 3) + of_class(8, 1))
    write_images(place / "r", of_class(8, 2) + of_class(2, 1) + of_class(4, 1))
    write_images(place / "sketch" / "val", of_class(3, 1, "png") + of_class(1, 3, "png"))
    for severity in range(1, 6):
        # 1 to 5 of the 8 images of snow are wrong.
        snow = of_class(3, 8 - severity) + of_class(1, severity)
        write_images(place / "c" / "snow" / str(severity), snow)
        # 1 of the 4 images of fog is wrong at each severity.
        fog = of_class(3, 3) + of_class(8, 1)
        write_images(place / "c" / "weather" / "fog" / str(severity), fog)
    suite = f"""
sets:
  ImageNet: {{kind: imagenet, data: {place}/imagenet, classes: all}}
  ReaL: {{kind: real, data: {place}/imagenet, labels: {place}/real.json, classes: all}}
  V2: {{kind: imagenet_v2, data: {place}/v2, classes: all}}
  A: {{kind: imagenet_a, data: {place}/a}}
  A kept: {{kind: folder, data: {place}/a, classes: all}}
  R: {{kind: imagenet_r, data: {place}/r}}
  Sketch: {{kind: imagenet_sketch, data: {place}/sketch, classes: all}}
  C: {{kind: imagenet_c, data: {place}/c, classes: all}}
"""
    (place / "all.yaml").write_text(suite)
    write_weights(place / "w.pth", 1000, ORDER)
    return place


# The number of images and the top-1 accuracy in percent of each set.
EXPECTED = {
    "ImageNet": (5, 40.0),
    "ReaL": (4, 50.0),
    "V2": (4, 50.0),
    "A": (4, 75.0),
    "A kept": (4, 0.0),
    "R": (4, 50.0),
    "Sketch": (4, 25.0),
}
# Mean errors of snow (1 + 2 + 3 + 4 + 5) / 8 / 5 and of fog 1/4, over those of AlexNet.
SNOW_ERROR = 0.375 / 0.866816
FOG_ERROR = 0.25 / 0.819324
MCE = 100 * (SNOW_ERROR + FOG_ERROR) / 2


@pytest.mark.slow
def test_imagenet_and_its_variants(imagenets, tmp_path, monkeypatch):
    few_corruptions(monkeypatch)
    output = tmp_path / "out"
    weights = imagenets / "w.pth"
    suite = imagenets / "all.yaml"
    code, printed = run_suite(weights, suite, output)
    assert code == 0, printed
    figures = figures_of(output)
    for name, (num, top1) in EXPECTED.items():
        assert figures[name]["num"] == num, name
        assert figures[name]["top1"] == pytest.approx(top1), name
    assert figures["C"]["mce"] == pytest.approx(MCE, rel=1e-12)
    assert figures["C"]["num"] == 60
    # Of the classes 3, 1, 8, 2, 9 that come first, all images of this set have one.
    assert figures["ImageNet"]["top5"] == 100
    assert "top5" not in figures["A"], "two classes compete"
    assert "| ReaL | 4 | 50.00 |" in printed
    assert f"mCE {MCE:.2f} %" in printed
    assert (output / "suite.md").read_text() in printed
    rows = (output / "suite.csv").read_text().splitlines()
    assert len(rows) == 9
    assert rows[0].startswith("set,kind,num,top1,")
    assert "names its classes by numbers" in printed
    assert "logits of the others are masked" in printed
    assert "taken for ImageNet's" in printed
    assert "resize 8, crop 8, bilinear" in printed

    # The counts do not depend on the number of ranks, nor on the batches.
    first_four_sets = imagenets / "few.yaml"
    lines = suite.read_text().splitlines()
    first_four_sets.write_text("\n".join(lines[:6]))
    output_of_two = tmp_path / "two"
    code, printed = run_suite(weights, first_four_sets, output_of_two, *THREES, world_size=2)
    assert code == 0, printed
    of_one_rank = read_results(output)
    of_two_ranks = read_results(output_of_two)
    assert list(of_two_ranks) == ["ImageNet", "ReaL", "V2", "A"]
    for name, entry in of_two_ranks.items():
        expected = dict(of_one_rank[name]["parts"][""])
        expected["loss_sum"] = pytest.approx(expected["loss_sum"], rel=1e-6)
        assert entry["parts"][""] == expected, name

    # A finished part is not evaluated again.
    monkeypatch.setattr("resnet_dist.commands.evaluate_suite.count_mapped", None)
    code, printed = run_suite(weights, suite, output)
    assert code == 0
    assert figures_of(output) == figures
    assert "10 finished parts are taken from" in printed


@pytest.mark.slow
def test_what_cannot_be_evaluated_does_not_stop_the_others(imagenets, tmp_path, monkeypatch):
    """Missing and damaged sets are a sentence each; the others are in the table; exit code 2."""
    few_corruptions(monkeypatch, ("fog", "frost"))
    suite = tmp_path / "some.yaml"
    suite.write_text(
        f"""
sets:
  gone: {{kind: imagenet_a, data: {tmp_path}/nowhere}}
  part: {{kind: imagenet_a, data: {imagenets}/a, classes: present}}
  whole: {{kind: imagenet, data: {imagenets}/imagenet}}
  names: {{kind: real, data: {imagenets}/a, labels: {imagenets}/real.json, classes: all}}
  wrong: {{kind: real, data: {imagenets}/imagenet, labels: {imagenets}/w.pth, classes: all}}
  C: {{kind: imagenet_c, data: {imagenets}/c, classes: all}}
  last: {{kind: imagenet_v2, data: {imagenets}/v2, classes: all}}
"""
    )
    output = tmp_path / "out"
    code, printed = run_suite(imagenets / "w.pth", suite, output)
    assert code == 2
    figures = figures_of(output)
    assert figures["part"]["top1"] == 75
    assert figures["last"]["top1"] == 50
    assert figures["C"]["num"] == 20
    assert "mce" not in figures["C"]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    expected = (
        ("gone: sets.gone.data", "does not exist"),
        ("whole: ", "add classes: present", "4 of the 1000 classes"),
        ("names: ", "is not named as ILSVRC2012_val_00000001.JPEG"),
        ("wrong: ", "cannot be read as JSON"),
        ("C: 5 of 10 parts", "no folder frost/"),
    )
    assert len(errors) == len(expected), printed
    for line, texts in zip(errors, expected, strict=True):
        for text in texts:
            assert text in line


def cifar_arrays(num):
    """Random images [num, 32, 32, 3], and labels 0, 1, ..., 9, 0, 1, ..."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(num) % 10
    return pixels, labels


def write_cifar(place):
    """CIFAR-10 (python and binary version), CIFAR-10.1 and CIFAR-10-C, with hand-made labels."""
    pixels, labels = cifar_arrays(20)
    # The published files have the channels first.
    flat = pixels.transpose(0, 3, 1, 2).reshape(20, -1)

    # CIFAR-10, python version.
    python_folder = place / "py" / "cifar-10-batches-py"
    python_folder.mkdir(parents=True)
    content = {
        b"data": flat,
        b"labels": labels.tolist(),
        b"batch_label": b"testing batch 1 of 1",
    }
    (python_folder / "test_batch").write_bytes(pickle.dumps(content))

    # CIFAR-10, binary version: a byte for the label, then the pixels.
    (place / "bin").mkdir()
    label_column = labels.astype(np.uint8)[:, None]
    records = np.concatenate([label_column, flat], axis=1)
    (place / "bin" / "test_batch.bin").write_bytes(records.tobytes())

    # CIFAR-10.1: half of the images are of class 7.
    (place / "one").mkdir()
    half_are_7 = np.array([7, 7, 0, 1, 7, 2, 3, 7], np.int32)
    np.save(place / "one" / "cifar10.1_v6_data.npy", pixels[:8])
    np.save(place / "one" / "cifar10.1_v6_labels.npy", half_are_7)

    # CIFAR-10-C: five severities of four images each; 0 to 4 of them are of class 7.
    (place / "c").mkdir()
    corrupted_labels = [
        [1, 1, 1, 1],
        [7, 1, 1, 1],
        [7, 7, 1, 1],
        [7, 7, 7, 1],
        [7, 7, 7, 7],
    ]
    np.save(place / "c" / "labels.npy", np.array(corrupted_labels).ravel())
    for name in ("snow", "fog"):
        np.save(place / "c" / f"{name}.npy", pixels)
    return pixels, labels


@pytest.mark.slow
def test_cifar_and_its_variants(tmp_path, monkeypatch):
    few_corruptions(monkeypatch)
    pixels, labels = write_cifar(tmp_path)
    weights = write_weights(tmp_path / "w.pth", 10, (7, 0, 1, 2, 3))
    suite = tmp_path / "cifar.yaml"
    suite.write_text(
        f"""
sets:
  python: {{kind: cifar10, data: {tmp_path}/py}}
  binary: {{kind: cifar10, data: {tmp_path}/bin}}
  CIFAR-10.1: {{kind: cifar10_1, data: {tmp_path}/one}}
  CIFAR-10-C: {{kind: cifar10_c, data: {tmp_path}/c}}
"""
    )
    # On two ranks, whose shares are not equal.
    output = tmp_path / "out"
    code, printed = run_suite(weights, suite, output, *THREES, world_size=2)
    assert code == 0, printed
    figures = figures_of(output)
    top1 = {name: entry["top1"] for name, entry in figures.items()}
    assert top1 == {
        "python": 10,
        "binary": 10,
        "CIFAR-10.1": 50,
        "CIFAR-10-C": 50,
    }
    assert figures["CIFAR-10-C"]["mean_error"] == pytest.approx(50)
    assert figures["python"]["top5"] == 50
    assert figures["binary"]["top5"] == 50

    # Both files give the pixels in their places, as the evaluation of image files shows them.
    for folder in ("py", "bin"):
        read = arrays.read_cifar10(tmp_path / folder)
        assert np.array_equal(read.pixels, pixels)
        assert np.array_equal(read.labels, labels)
    # Part 3 of 5, counted from 0.
    corrupted = tmp_path / "c"
    part = arrays.read_arrays(corrupted / "fog.npy", corrupted / "labels.npy", 3, 5)
    assert np.array_equal(part.pixels, pixels[12:16])
    assert part.labels.tolist() == [7, 7, 7, 1]


def test_parts_that_were_counted_with_other_options_are_not_taken():
    entry = SuiteEntry("a", "folder", "x", classes="all")
    counts = PartCounts(
        num=4,
        correct1=1,
        correct5=None,
        loss_sum=2.0,
        num_bad=0,
    )
    result = SetResult(entry, {"": counts})
    written = json.dumps({"a": result.as_plain()})
    earlier = json.loads(written)
    assert evaluate_suite._finished_parts(entry, earlier) == {"": counts}
    changes = (
        {"classes": ""},
        {"classes": "present"},
        {"data": "y"},
        {"kind": "imagenet"},
    )
    for change in changes:
        other = replace(entry, **change)
        assert evaluate_suite._finished_parts(other, earlier) == {}, change


def load_arrays(pixels, labels, config, rank):
    """The batches that `rank` of two ranks evaluates; a round without a batch is left out."""
    runtime = OneProcess()
    runtime.rank = rank
    runtime.world_size = 2
    images = arrays.ImageArrays(pixels, labels)
    loader = arrays.ArrayLoader(images, arrays.CIFAR10_CLASSES, config, runtime)
    batches = list(loader)
    assert loader.rounds == 2
    assert len(batches) == 2
    return [batch for batch in batches if batch is not None]


def test_arrays_pass_through_the_geometry_of_files(tmp_path):
    """Batch by batch, on two ranks: the images are those of `EvaluationTransform`."""
    pixels, labels = cifar_arrays(5)
    data = DataConfig(val_resize_size=40, val_crop_size=24, val_batch_size=2)
    config = Config(data=data)
    transform = EvaluationTransform(data)
    label_of = {}
    image_of = {}
    for rank in range(2):
        for batch in load_arrays(pixels, labels, config, rank):
            rows = batch.indices.tolist()
            label_of.update(zip(rows, batch.labels.tolist(), strict=True))
            image_of.update(zip(rows, batch.images, strict=True))
    assert sorted(image_of) == [0, 1, 2, 3, 4]
    for row, image in image_of.items():
        assert label_of[row] == labels[row]
        expected = transform(Image.fromarray(pixels[row]))
        assert torch.allclose(image.float(), expected, atol=0.02)


def test_mean_corruption_error():
    """AlexNet has 100; a corruption whose severities are not complete is left out."""
    # AlexNet's errors are means over the severities: the shifts add up to zero.
    shifts = (-0.2, -0.1, 0, 0.1, 0.2)
    errors = {}
    for name, mean_error in corruptions.ALEXNET_ERRORS.items():
        for severity, shift in zip(corruptions.SEVERITIES, shifts, strict=True):
            part = corruptions.part_name(name, severity)
            errors[part] = mean_error + shift
    averages = corruptions.average_errors(errors)
    assert len(averages) == 15
    assert corruptions.mean_corruption_error(averages) == pytest.approx(100)
    halves = {name: error / 2 for name, error in averages.items()}
    assert corruptions.mean_corruption_error(halves) == pytest.approx(50)

    del errors["fog/5"]
    averages = corruptions.average_errors(errors)
    assert corruptions.missing_corruptions(averages) == ["fog"]


class Evil:
    """Reading it with plain pickle would call `print`."""

    def __reduce__(self):
        return (print, ("run",))


def test_damaged_files_are_one_sentence(tmp_path, capsys):
    pixels, labels = write_cifar(tmp_path)

    # CIFAR-10: no code of a pickle runs; the size of the binary file must fit.
    python_batch = tmp_path / "py" / "cifar-10-batches-py" / "test_batch"
    python_batch.write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"test_batch is damaged.*builtins.print"):
        arrays.read_cifar10(tmp_path / "py")
    assert capsys.readouterr().out == ""
    binary_batch = tmp_path / "bin" / "test_batch.bin"
    binary_batch.write_bytes(b"12")
    with pytest.raises(ValueError, match="no multiple of 3073"):
        arrays.read_cifar10(tmp_path / "bin")
    with pytest.raises(ValueError, match="neither test_batch"):
        arrays.read_cifar10(tmp_path)

    # CIFAR-10-C: the number of images and labels, and the values of the labels.
    images_path = tmp_path / "c" / "fog.npy"
    labels_path = tmp_path / "c" / "labels.npy"
    with pytest.raises(ValueError, match="do not divide into 3 parts"):
        arrays.read_arrays(images_path, labels_path, 0, 3)
    np.save(labels_path, labels[:7])
    with pytest.raises(ValueError, match=r"20 images, and labels.npy 7 labels"):
        arrays.read_arrays(images_path, labels_path)
    np.save(labels_path, labels + 5)
    with pytest.raises(ValueError, match="from 0 to 9"):
        arrays.read_arrays(images_path, labels_path)

    # The file of the images is cut, or has another type.
    start_of_file = images_path.read_bytes()[:100]
    images_path.write_bytes(start_of_file)
    with pytest.raises(ValueError, match=r"fog.npy is damaged"):
        arrays.read_arrays(images_path, labels_path)
    np.save(images_path, pixels.astype(np.float32))
    with pytest.raises(ValueError, match=r"float32.*and not images uint8"):
        arrays.read_arrays(images_path, labels_path)


def test_wrong_suites_are_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "suite.yaml"
    wrong = {
        "": "it must have the key sets",
        "sets: {}": "it must have the key sets",
        "sets: [1]": "it must have the key sets",
        "sets: {a: {kind: folder}": "is not valid YAML",
        "sets: {a: {kind: folder, data: x}, a: {kind: folder, data: y}}": "a is there twice",
        "sets: {a: 3}": "sets.a must have kind and data",
        "sets: {a: {kind: folder}}": "sets.a has no data",
        "sets: {a: {data: x}}": "sets.a has no kind",
        "sets: {a: {kind: imagnet, data: x}}": "kind is imagnet.*did you mean imagenet",
        "sets: {a: {kind: folder, data: x, clases: all}}": "clases.*did you mean classes",
        "sets: {a: {kind: folder, data: x, classes: some}}": "classes is some.*present, all",
        "sets: {a: {kind: folder, data: 3}}": "sets.a.data is 3: it must be a text",
        "sets: {a: {kind: real, data: x}}": "sets.a has no labels",
        "sets: {a: {kind: folder, data: x, labels: y}}": "only for the kind real",
        "sets: {a: {kind: folder, data: $UNSET_FOLDER}}": "UNSET_FOLDER is not set",
    }
    monkeypatch.delenv("UNSET_FOLDER", raising=False)
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_suite(path)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert "--suite" in sentence

    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_suite(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_suite(tmp_path / "gone.yaml")


def test_the_suite_of_the_documentation_is_read(tmp_path):
    repository = Path(__file__).resolve().parents[1]
    page = repository / "docs" / "evaluation.md"
    [suite] = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    path = tmp_path / "suite.yaml"
    path.write_text(suite)
    entries = {entry.name: entry for entry in read_suite(path)}
    assert len(entries) == 8
    assert entries["A"].classes == "present"
