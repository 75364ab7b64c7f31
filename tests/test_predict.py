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
    # As Python's own.
    sys.stderr.reconfigure(errors="backslashreplace")
    return cli.main(arguments)


def run(command, folder, *arguments, entry=main):
    """Exit code and output of a command in a process of its own."""
    threads = ("--distributed.threads", "1", "--data.threads", "1")
    return run_command(folder, [command, *arguments, *threads], entry=entry)


def objects(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def classes_of(image):
    """The classes of a prediction, the likeliest first."""
    return [best["class"] for best in image["predictions"]]


@pytest.mark.slow
def test_a_validation_folder_gets_what_evaluation_gives_it(checkpoint, digits, tmp_path):
    """The same top-1 and top-5 counts, of views with their mirror images; the very probabilities of
    these batches.
    """
    settings = [
        *("--checkpoint", checkpoint, "--json"),
        *("--data.val_flip", "true", "--data.val_batch_size", "100"),
    ]
    code, text = run("evaluate", tmp_path, *settings)
    counts = objects(text)[0]["ema"]
    assert code == 0
    assert counts["num"] == 355
    assert 0 < counts["correct1"] < counts["correct5"] < 355
    code, text = run("predict", tmp_path, *settings, f"{digits}/val")
    assert code == 0
    assert "resnet20, ema weights of step 2" in text
    found = objects(text)
    index = build_index(digits, "val", OneProcess())
    assert [image["path"] for image in found] == [index.path(row) for row in range(355)]
    correct1 = 0
    correct5 = 0
    for image in found:
        label = Path(image["path"]).parent.name
        best, *_ = classes_of(image)
        if label == best:
            correct1 += 1
        if label in classes_of(image):
            correct5 += 1
    assert correct1 == counts["correct1"]
    assert correct5 == counts["correct5"]

    expected = probabilities_of_evaluation(checkpoint, index, tmp_path)
    for image, row in zip(found, expected, strict=True):
        predictions = image["predictions"]
        probabilities = [best["probability"] for best in predictions]
        assert probabilities == [row[best["index"]] for best in predictions]
        assert probabilities == sorted(row, reverse=True)[:5]


def probabilities_of_evaluation(checkpoint, index, folder):
    """Of all classes for each image, in batches of 100 with their mirror images."""
    saved = open_network(Path(checkpoint))
    config = Config(model=ModelConfig("resnet20"))
    model, weights = load_network(saved, config, torch.device("cpu"))
    assert weights == "ema"
    changed = {"val_flip": True, "val_batch_size": 100, "kind": "folder"}
    data = saved.content["config"]["data"] | changed
    precision = Precision(saved.content["config"]["train"]["precision"])
    loader = val_loader(index, folder, dtype=precision.dtype, **data)
    rows = []
    for batch in loader:
        logits = evaluation.predict_logits(model, batch, loader.mirrored, precision)
        rows += logits.softmax(1).tolist()
    loader.close()
    return rows


@pytest.mark.slow
def test_what_cannot_be_used_is_named_and_the_others_go_on(checkpoint, digits, tmp_path):
    good = f"{digits}/val/3/0004.jpg"
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(encode(picture(40, 50))[:-300])
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "small.png").write_bytes(encode(picture(7, 300), "PNG"))
    (tmp_path / "damaged.png").write_bytes(encode(picture(40, 50), "PNG").replace(b"IDAT", b"IDOT"))
    shutil.copy(good, strange)
    words = [
        "--data.val_resize_size",
        "16",
        "--checkpoint",
        checkpoint,
        tmp_path / "missing.jpg",
        good,
        tmp_path / "text.jpg",
        tmp_path / "cut.jpg",
        tmp_path / "small.png",
        good,
        strange,
        tmp_path / "damaged.png",
    ]
    code, text = run("predict", tmp_path, *words, "--json", "--top", "20")
    found = objects(text)
    assert code == 1
    assert len(found) == 8
    assert "Traceback" not in text
    used = [image for image in found if "error" not in image]
    refused = [image for image in found if "error" in image]
    errors = {os.path.basename(image["path"]): image["error"] for image in refused}
    assert list(errors) == ["missing.jpg", "text.jpg", "cut.jpg", "damaged.png"]
    assert "No such file" in errors["missing.jpg"]
    assert "neither JPEG nor PNG" in errors["text.jpg"]
    assert "end marker" in errors["cut.jpg"]
    assert "the decoder refuses it" in errors["damaged.png"]
    assert found[1] == found[5] == found[6] | {"path": good}
    assert found[6]["path"] == strange
    assert len(used) == 4
    for image in used:
        assert len(set(classes_of(image))) == 10, "as many as there are"
        total = sum(best["probability"] for best in image["predictions"])
        assert abs(total - 1) < 1e-5

    code, text = run("predict", tmp_path, *words, "--top", "2")
    lines = text.splitlines()
    rows = [line for line in lines if " % " in line]
    assert code == 1
    assert len(rows) == 8
    columns = {line.index(" % ") for line in rows if "udcff" not in line}
    assert len(columns) == 1, "aligned"
    assert rows[0].split()[0] == good
    assert not rows[1].split()[0].startswith("/")
    assert len([line for line in lines if line.startswith("error: ")]) == 4
    assert "\\udcff" in text
    assert not list((tmp_path).glob("**/quarantine.jsonl"))
    code, text = run("predict", tmp_path, "--checkpoint", checkpoint, tmp_path / "text.jpg")
    assert code == 2
    assert "Traceback" not in text
    assert "neither JPEG nor PNG" in text


@pytest.mark.slow
def test_interrupts_and_closed_pipes_are_quiet(checkpoint, digits, tmp_path):
    def closed(arguments):
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        return cli.main(arguments)

    def interrupted(arguments):
        real = evaluation.predict_logits

        def predict(*parts):
            os.kill(os.getpid(), signal.SIGINT)
            return real(*parts)

        evaluation.predict_logits = predict
        return cli.main(arguments)

    words = ("--checkpoint", checkpoint, f"{digits}/val")
    for entry, expected in ((closed, 141), (interrupted, 130)):
        code, text = run("predict", tmp_path, *words, entry=entry)
        assert code == expected
        assert text.splitlines() == ["resnet20, ema weights of step 2"]


def give_on_stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


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
    (tmp_path / "b" / "deep" / "circle").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "b-c")
    monkeypatch.chdir(tmp_path)
    return tmp_path


IMAGES_IN_B = ["b/10.png", "b/2.JPG", "b/deep/0.jpg"]


def test_images_are_found_in_folders_in_the_order_of_the_index(tree):
    """Where b comes before b-c. A file that is named is taken, whatever it is."""
    below = [*IMAGES_IN_B, "b-c/1.jpeg", "z/1.jpeg"]
    assert find_images(["."]) == [f"./{name}" for name in below]
    assert find_images(["b/notes.txt", "z", "gone"]) == ["b/notes.txt", "z/1.jpeg", "gone"]


def test_names_of_images_come_from_standard_input(tree, monkeypatch):
    """One a line, or with null bytes between them."""
    expected = [*IMAGES_IN_B, "b/notes.txt", "b-c/1.jpeg", os.fsdecode(b"\xff.jpg")]
    for data in (b"b/notes.txt\n\nb-c\n\xff.jpg", b"b/notes.txt\0b-c\0\xff.jpg\0"):
        give_on_stdin(monkeypatch, data)
        assert find_images(["b", "-"]) == expected
    give_on_stdin(monkeypatch, encode(picture(8, 8)))
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
    def entry(arguments):
        reader, writer = os.pipe()
        with open(f"{digits}/val/3/0004.jpg", "rb") as file:
            os.write(writer, file.read())
        os.close(writer)
        os.dup2(reader, 0)
        return cli.main(arguments)

    words = ("--checkpoint", checkpoint, "/dev/stdin", "--top", "1")
    code, text = run("predict", tmp_path, *words, entry=entry)
    assert code == 0
    assert text.splitlines()[1].startswith("/dev/stdin  ")


@pytest.mark.slow
def test_wrong_options_are_refused(checkpoint, digits, tmp_path, monkeypatch, capsys):
    image = f"{digits}/val/3/0004.jpg"
    for arguments, said in (
        (["--model.name", "resnet32"], "the settings of model are the checkpoint's"),
        (["--data.val_resize_size", "8"], "it must be at least data.val_crop_size"),
        (["--top", "0"], "--top is 0: it must be at least 1"),
        (["--topp", "3"], "no option --topp; did you mean --top?"),
    ):
        with pytest.raises(SystemExit) as ending:
            cli.main(["predict", image, "--checkpoint", checkpoint, *arguments])
        assert ending.value.code == 2
        assert said in capsys.readouterr().err
    assert cli.main(["predict", image, "--checkpoint", str(tmp_path / "gone.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process: start it without torchrun"):
        refuse_several_processes()
