"""Predictions of single images: those of evaluation, whatever else is named beside them."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from data_files import write_tree
from dist_utils import run_command
from image_files import OneProcess, encode, picture, val_loader

from resnet_dist import cli
from resnet_dist.checkpoints.saved_network import (
    load_network,
    open_network,
    refuse_several_processes,
)
from resnet_dist.commands.predict import find_images
from resnet_dist.config import Config, ModelConfig
from resnet_dist.data.sources.scan import build_index
from resnet_dist.evaluation import loop as evaluation
from resnet_dist.precision import Precision


def main(arguments):
    """The command line, with Python's own way of printing odd characters, in place of pytest's."""
    sys.stderr.reconfigure(errors="backslashreplace")
    return cli.main(arguments)


def run(command, folder, *arguments, entry=main):
    """Exit code and output of a command in a process of its own."""
    words = [
        command,
        *arguments,
        *("--distributed.threads", "1"),
        *("--data.threads", "1"),
    ]
    return run_command(folder, words, entry=entry)


def parse_objects(text):
    """The JSON objects of a text that has one a line, among other lines."""
    lines = text.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def classes_of(image):
    """The classes of a prediction, the likeliest first."""
    return [best["class"] for best in image["predictions"]]


def probabilities_of(image):
    """The probabilities of a prediction, the highest first."""
    return [best["probability"] for best in image["predictions"]]


@pytest.mark.slow
def test_a_validation_folder_gets_what_evaluation_gives_it(checkpoint, digits, tmp_path):
    """The same top-1 and top-5 counts, of views with their mirror images; the very probabilities of
    these batches.
    """
    settings = (
        *("--checkpoint", checkpoint),
        *("--data.val_flip", "true"),
        *("--data.val_batch_size", "100"),
        "--json",
    )
    code, text = run("evaluate", tmp_path, *settings)
    assert code == 0
    counts = parse_objects(text)[0]["ema"]
    assert counts["num"] == 355
    assert 0 < counts["correct1"] < counts["correct5"] < 355

    code, text = run("predict", tmp_path, *settings, f"{digits}/val")
    assert code == 0
    assert "resnet20, ema weights of step 2" in text
    found = parse_objects(text)
    index = build_index(digits, "val", OneProcess())
    paths = [image["path"] for image in found]
    assert paths == [index.path(row) for row in range(355)]

    correct1 = 0
    correct5 = 0
    for image in found:
        label = Path(image["path"]).parent.name
        classes = classes_of(image)
        if label == classes[0]:
            correct1 += 1
        if label in classes:
            correct5 += 1
    assert correct1 == counts["correct1"]
    assert correct5 == counts["correct5"]

    expected = probabilities_of_evaluation(checkpoint, index, tmp_path)
    for image, of_all_classes in zip(found, expected, strict=True):
        probabilities = probabilities_of(image)
        for best in image["predictions"]:
            assert best["probability"] == of_all_classes[best["index"]]
        assert probabilities == sorted(of_all_classes, reverse=True)[:5]


def probabilities_of_evaluation(checkpoint, index, folder):
    """Of all classes for each image, in batches of 100 with their mirror images."""
    saved = open_network(Path(checkpoint))
    saved_config = saved.content["config"]
    config = Config(model=ModelConfig("resnet20"))
    model, weights = load_network(saved, config, torch.device("cpu"))
    assert weights == "ema"

    precision = Precision(saved_config["train"]["precision"])
    settings = {
        **saved_config["data"],
        "val_flip": True,
        "val_batch_size": 100,
        "kind": "folder",
    }
    loader = val_loader(index, folder, dtype=precision.dtype, **settings)
    rows = []
    for batch in loader:
        logits = evaluation.predict_logits(model, batch, loader.mirrored, precision)
        rows += logits.softmax(1).tolist()
    loader.close()
    return rows


@pytest.fixture
def good_and_bad_images(digits, tmp_path):
    """Paths of four images that can be used and of four that cannot, in an order that mixes them.

    The first that can be used is named again, and the third is a copy of it under a name that is no
    UTF-8.
    """
    good = f"{digits}/val/3/0004.jpg"
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copy(good, strange)
    jpeg = encode(picture(40, 50))
    png = encode(picture(40, 50), "PNG")
    contents = {
        "text.jpg": b"no image",
        "cut.jpg": jpeg[:-300],
        "small.png": encode(picture(7, 300), "PNG"),
        "damaged.png": png.replace(b"IDAT", b"IDOT"),
    }
    write_tree(tmp_path, contents)
    return [
        str(tmp_path / "missing.jpg"),
        good,
        str(tmp_path / "text.jpg"),
        str(tmp_path / "cut.jpg"),
        str(tmp_path / "small.png"),
        good,
        strange,
        str(tmp_path / "damaged.png"),
    ]


@pytest.mark.slow
def test_what_cannot_be_used_is_named_and_the_others_go_on(
    checkpoint, good_and_bad_images, tmp_path
):
    words = (
        *("--data.val_resize_size", "16"),
        *("--checkpoint", checkpoint),
        *good_and_bad_images,
    )
    code, text = run("predict", tmp_path, *words, "--json", "--top", "20")
    found = parse_objects(text)
    assert code == 1
    assert len(found) == 8
    assert "Traceback" not in text
    errors = {}
    used = []
    for image in found:
        if "error" in image:
            name = os.path.basename(image["path"])
            errors[name] = image["error"]
        else:
            used.append(image)

    assert list(errors) == ["missing.jpg", "text.jpg", "cut.jpg", "damaged.png"]
    assert "No such file" in errors["missing.jpg"]
    assert "neither JPEG nor PNG" in errors["text.jpg"]
    assert "end marker" in errors["cut.jpg"]
    assert "the decoder refuses it" in errors["damaged.png"]

    good, _, good_again, strange = used
    assert good["path"] == good_and_bad_images[1]
    assert good_again == good
    assert strange["path"] == good_and_bad_images[6]
    assert {**strange, "path": good["path"]} == good
    for image in used:
        classes = set(classes_of(image))
        assert len(classes) == 10, "as many as there are"
        total = sum(probabilities_of(image))
        assert abs(total - 1) < 1e-5

    # The same as a table, whose columns are aligned.
    code, text = run("predict", tmp_path, *words, "--top", "2")
    lines = text.splitlines()
    rows = [line for line in lines if " % " in line]
    assert code == 1
    assert len(rows) == 8
    columns = set()
    for row in rows:
        if "udcff" not in row:
            columns.add(row.index(" % "))
    assert len(columns) == 1
    assert rows[0].startswith(f"{good['path']} ")
    assert not rows[1].lstrip().startswith("/"), "each image is named once"
    error_lines = [line for line in lines if line.startswith("error: ")]
    assert len(error_lines) == 4
    assert "\\udcff" in text
    assert list(tmp_path.glob("**/quarantine.jsonl")) == []

    # One image, which cannot be used.
    no_image = tmp_path / "text.jpg"
    code, text = run("predict", tmp_path, "--checkpoint", checkpoint, no_image)
    assert code == 2
    assert "Traceback" not in text
    assert "neither JPEG nor PNG" in text


@pytest.mark.slow
def test_interrupts_and_closed_pipes_are_quiet(checkpoint, digits, tmp_path):
    def with_closed_pipe(arguments):
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        return cli.main(arguments)

    def interrupted(arguments):
        real_predict = evaluation.predict_logits

        def interrupt_and_predict(*parts):
            os.kill(os.getpid(), signal.SIGINT)
            return real_predict(*parts)

        evaluation.predict_logits = interrupt_and_predict
        return cli.main(arguments)

    words = ("--checkpoint", checkpoint, f"{digits}/val")
    for entry, expected in (
        (with_closed_pipe, 128 + signal.SIGPIPE),
        (interrupted, 128 + signal.SIGINT),
    ):
        code, text = run("predict", tmp_path, *words, entry=entry)
        assert code == expected
        assert text.splitlines() == ["resnet20, ema weights of step 2"]


def give_on_stdin(monkeypatch, data):
    """Let this process read these bytes from its standard input."""
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders with images, hidden and other files, and links; they are the current folder."""
    names = (
        "b/2.JPG",
        "b/10.png",
        "b/.hidden.jpg",
        "b/notes.txt",
        "b-c/1.jpeg",
        "b/.cache/1.jpg",
        "b/deep/0.jpg",
    )
    write_tree(tmp_path, dict.fromkeys(names, b""))
    circle = tmp_path / "b" / "deep" / "circle"
    circle.symlink_to(tmp_path)
    link = tmp_path / "z"
    link.symlink_to(tmp_path / "b-c")
    monkeypatch.chdir(tmp_path)
    return tmp_path


IMAGES_IN_B = ["b/10.png", "b/2.JPG", "b/deep/0.jpg"]


def test_images_are_found_in_folders_in_the_order_of_the_index(tree):
    """Where b comes before b-c. A file that is named is taken, whatever it is."""
    below = [*IMAGES_IN_B, "b-c/1.jpeg", "z/1.jpeg"]
    found = find_images(["."])
    assert found == [f"./{name}" for name in below]
    found = find_images(["b/notes.txt", "z", "gone"])
    assert found == ["b/notes.txt", "z/1.jpeg", "gone"]


def test_names_of_images_come_from_standard_input(tree, monkeypatch):
    """One a line, or with null bytes between them."""
    no_utf8 = os.fsdecode(b"\xff.jpg")
    expected = [*IMAGES_IN_B, "b/notes.txt", "b-c/1.jpeg", no_utf8]
    for data in (
        b"b/notes.txt\n\nb-c\n\xff.jpg",
        b"b/notes.txt\0b-c\0\xff.jpg\0",
    ):
        give_on_stdin(monkeypatch, data)
        assert find_images(["b", "-"]) == expected

    # The bytes of an image are not names.
    image = encode(picture(8, 8))
    give_on_stdin(monkeypatch, image)
    with pytest.raises(ValueError, match="name /dev/stdin"):
        find_images(["-"])


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image: name files, folders"):
        find_images([str(tmp_path)])


@pytest.mark.slow
def test_a_full_disk_is_said(checkpoint, digits, tmp_path):
    def entry(arguments):
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115  closing it would fail
        return cli.main(arguments)

    words = ("--checkpoint", checkpoint, f"{digits}/val/3/0004.jpg")
    code, text = run("predict", tmp_path, *words, entry=entry)
    assert code == 2
    assert "standard output cannot be written" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_the_bytes_of_an_image_come_from_a_pipe(checkpoint, digits, tmp_path):
    image = Path(f"{digits}/val/3/0004.jpg").read_bytes()

    def entry(arguments):
        reader, writer = os.pipe()
        os.write(writer, image)
        os.close(writer)
        os.dup2(reader, 0)
        return cli.main(arguments)

    words = ("--checkpoint", checkpoint, "/dev/stdin", "--top", "1")
    code, text = run("predict", tmp_path, *words, entry=entry)
    assert code == 0
    _, prediction = text.splitlines()
    assert prediction.startswith("/dev/stdin  ")


@pytest.mark.slow
def test_wrong_options_are_refused(checkpoint, digits, tmp_path, monkeypatch, capsys):
    image = f"{digits}/val/3/0004.jpg"
    words = ["predict", image, "--checkpoint"]
    for arguments, said in (
        (["--model.name", "resnet32"], "the settings of model are the checkpoint's"),
        (["--data.val_resize_size", "8"], "it must be at least data.val_crop_size"),
        (["--top", "0"], "--top is 0: it must be at least 1"),
        (["--topp", "3"], "no option --topp; did you mean --top?"),
    ):
        with pytest.raises(SystemExit) as ending:
            cli.main([*words, checkpoint, *arguments])
        assert ending.value.code == 2
        assert said in capsys.readouterr().err

    missing = tmp_path / "gone.pt"
    assert cli.main([*words, str(missing)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process: start it without torchrun"):
        refuse_several_processes()
