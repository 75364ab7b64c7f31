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
from dist_utils import run_app
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
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own
    return cli.main(arguments)


def run(command, folder, *arguments, entry=main):
    """Exit code and output of a command in a process of its own."""
    log = folder / f"log{len(list(folder.glob('log*')))}"
    [code] = run_app(
        1,
        [command, *map(str, arguments), "--distributed.threads", "1", "--data.threads", "1"],
        str(log),
        entry,
    )
    return code, log.read_text()


def objects(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_validation_folder_gets_what_evaluation_gives_it(checkpoint, digits, tmp_path):
    """The same top-1 and top-5 counts, of views with their mirror images; the very probabilities of
    these batches.
    """
    settings = [
        "--checkpoint",
        checkpoint,
        "--json",
        "--data.val_flip",
        "true",
        "--data.val_batch_size",
        "100",
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
    ranks = [[best["class"] for best in image["predictions"]] for image in found]
    own = [image["path"].split("/")[-2] for image in found]
    assert (
        sum(label == rank[0] for label, rank in zip(own, ranks, strict=True)) == counts["correct1"]
    )
    assert sum(label in rank for label, rank in zip(own, ranks, strict=True)) == counts["correct5"]

    saved = open_network(Path(checkpoint))
    config = Config(model=ModelConfig("resnet20"))
    model, weights = load_network(saved, config, torch.device("cpu"))
    changed = {"val_flip": True, "val_batch_size": 100, "kind": "folder"}
    data = saved.content["config"]["data"] | changed
    precision = Precision(saved.content["config"]["train"]["precision"])
    loader = val_loader(index, tmp_path, dtype=precision.dtype, **data)
    shares = []
    for batch in loader:
        logits = evaluation.predict_logits(model, batch, loader.mirrored, precision)
        shares += logits.softmax(1).tolist()
    loader.close()
    assert weights == "ema"
    assert len(shares) == 355
    for image, row in zip(found, shares, strict=True):
        assert (
            [best["probability"] for best in image["predictions"]]
            == [row[best["index"]] for best in image["predictions"]]
            == sorted(row, reverse=True)[:5]
        )


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
    errors = {
        os.path.basename(image["path"]): image["error"] for image in found if "error" in image
    }
    assert list(errors) == ["missing.jpg", "text.jpg", "cut.jpg", "damaged.png"]
    assert "No such file" in errors["missing.jpg"]
    assert "neither JPEG nor PNG" in errors["text.jpg"]
    assert "end marker" in errors["cut.jpg"]
    assert "the decoder refuses it" in errors["damaged.png"]
    assert found[1] == found[5] == found[6] | {"path": good}
    assert found[6]["path"] == strange
    predictions = [image["predictions"] for image in found if "error" not in image]
    assert [len({best["class"] for best in ranks}) for ranks in predictions] == [
        10
    ] * 4  # as many as there are
    assert all(abs(sum(best["probability"] for best in ranks) - 1) < 1e-5 for ranks in predictions)

    code, text = run("predict", tmp_path, *words, "--top", "2")
    lines = text.splitlines()
    rows = [line for line in lines if " % " in line]
    assert code == 1
    assert len(rows) == 8
    assert len({line.index(" % ") for line in rows if "udcff" not in line}) == 1  # aligned
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
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background inherits "ignore"

        def predict(*parts):
            os.kill(os.getpid(), signal.SIGINT)
            return real(*parts)

        evaluation.predict_logits = predict
        return cli.main(arguments)

    for entry, expected in ((closed, 141), (interrupted, 130)):
        code, text = run(
            "predict", tmp_path, "--checkpoint", checkpoint, f"{digits}/val", entry=entry
        )
        assert code == expected
        assert text.splitlines() == ["resnet20, ema weights of step 2"]


def test_what_is_named(tmp_path, monkeypatch):
    for name in (
        "b/2.JPG",
        "b/10.png",
        "b/.hidden.jpg",
        "b/notes.txt",
        "b-c/1.jpeg",
        "b/.cache/1.jpg",
        "b/deep/0.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "deep" / "circle").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "b-c")
    monkeypatch.chdir(tmp_path)
    below = [
        "b/10.png",
        "b/2.JPG",
        "b/deep/0.jpg",
        "b-c/1.jpeg",
        "z/1.jpeg",
    ]  # as in the index: b before b-c
    assert find_images(["."]) == [f"./{name}" for name in below]
    assert find_images(["b/notes.txt", "z", "gone"]) == ["b/notes.txt", "z/1.jpeg", "gone"]
    for data in (b"b/notes.txt\n\nb-c\n\xff.jpg", b"b/notes.txt\0b-c\0\xff.jpg\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert find_images(["b", "-"]) == below[:3] + [
            "b/notes.txt",
            "b-c/1.jpeg",
            os.fsdecode(b"\xff.jpg"),
        ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encode(picture(8, 8)))))
    with pytest.raises(ValueError, match="name /dev/stdin"):
        find_images(["-"])
    shutil.rmtree("b")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="no image: name files, folders"):
        find_images(["b"])


@pytest.mark.slow
def test_a_full_disk_is_said(checkpoint, digits, tmp_path):
    def entry(arguments):
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115  closing it would fail
        return cli.main(arguments)

    code, text = run(
        "predict", tmp_path, "--checkpoint", checkpoint, f"{digits}/val/3/0004.jpg", entry=entry
    )
    assert code == 2
    assert "standard output cannot be written" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_bytes_from_a_pipe(checkpoint, digits, tmp_path):
    def entry(arguments):
        reader, writer = os.pipe()
        with open(f"{digits}/val/3/0004.jpg", "rb") as file:
            os.write(writer, file.read())
        os.close(writer)
        os.dup2(reader, 0)
        return cli.main(arguments)

    code, text = run(
        "predict", tmp_path, "--checkpoint", checkpoint, "/dev/stdin", "--top", "1", entry=entry
    )
    assert code == 0
    assert text.splitlines()[1].startswith("/dev/stdin  ")


@pytest.mark.slow
def test_refusals(checkpoint, digits, tmp_path, monkeypatch, capsys):
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
