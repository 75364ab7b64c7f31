"""What evaluate, predict and export make of run folders, foreign and damaged checkpoints."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_utils import load_content
from dist_utils import run_command

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import write_checkpoint

SETTINGS = ("--data.threads", "1", "--distributed.threads", "1")


def run(folder, *words):
    """The exit code of a command, and what it prints."""
    return run_command(folder, [*words, *SETTINGS])


def exit_code(words):
    """The exit code of a command that runs in this process."""
    try:
        return cli.main(words)
    except SystemExit as ending:
        return ending.code


def content_of(checkpoint):
    """The content of a checkpoint, to be changed and written again."""
    content = load_content(Path(checkpoint))
    # So that a file without a digest at its end is taken for that of an older version.
    del content["sha256_in_zip_comment"]
    return content


@pytest.mark.slow
def test_a_foreign_checkpoint_leads_nowhere(checkpoint, digits, tmp_path):
    """Nothing is written into the folders that it names, also for bad images and the digits."""
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    threes = sorted((data / "val" / "3").iterdir())
    for path in threes[:2]:
        path.write_bytes(b"")

    named = tmp_path / "named"
    content = content_of(checkpoint)
    content["config"]["output_dir"] = str(named / "run")
    content["config"]["data"]["data_dir"] = str(named / "digits")
    path = tmp_path / "foreign.pt"
    write_checkpoint(path, content)

    code, printed = run(tmp_path, "evaluate", "--checkpoint", path)
    assert code == 0, printed
    assert "top-1" in printed, printed
    assert "(" in printed
    assert "/355)" in printed
    assert not named.exists()

    evaluate_images = (
        "evaluate",
        *("--checkpoint", path),
        *("--data.kind", "folder"),
        *("--data.data_dir", data),
    )
    code, printed = run(tmp_path, *evaluate_images, "--json")
    assert code == 0
    counts = json.loads(printed.splitlines()[-1])
    assert counts["bad_images"] == 2
    code, printed = run(tmp_path, *evaluate_images)
    assert code == 0
    assert "2 images cannot be decoded and count as misses" in printed

    fours = data / "val" / "4"
    image = next(fours.glob("*.jpg"))
    code, printed = run(tmp_path, "predict", image, "--checkpoint", path)
    assert code == 0, printed
    assert not named.exists()
    assert list(tmp_path.rglob("quarantine.jsonl")) == []


@pytest.mark.slow
def test_a_run_folder_is_taken_everywhere(checkpoint, digits, tmp_path):
    """By evaluate, predict, export, checkpoint.resume and checkpoint.init_from."""
    folder = Path(checkpoint).parents[1]
    image = f"{digits}/val/3/0004.jpg"
    code, printed = run(tmp_path, "predict", image, "--checkpoint", folder)
    assert code == 0, printed
    output = tmp_path / "x.safetensors"
    code, printed = run(
        tmp_path,
        "export",
        *("--checkpoint", folder),
        *("--to", "safetensors"),
        *("--output", output),
    )
    assert code == 0, printed
    assert output.exists()

    def train(name, setting, value):
        return run(
            tmp_path,
            "train",
            *("--config", folder / "config.yaml"),
            *("--data.data_dir", digits),
            *("--output_dir", tmp_path / name),
            *(setting, value),
        )

    code, printed = train("a", "--checkpoint.init_from", folder)
    assert code == 0, printed
    assert "step 0, with the weights of" in printed, printed

    code, printed = train("b", "--checkpoint.resume", folder)
    assert code == 0, printed
    assert "step 2, from" in printed, printed

    without_checkpoint = tmp_path
    code, printed = train("c", "--checkpoint.resume", without_checkpoint)
    assert code == 2
    assert "holds no checkpoint" in printed
    assert "Traceback" not in printed


def test_a_wrong_image_is_noticed_before_the_network_is_read(tmp_path, monkeypatch, capsys):
    """Here there is not even a checkpoint."""
    missing_checkpoint = tmp_path / "gone.pt"
    words = ["predict", "nosuch.jpg", "neither.png", "--checkpoint", str(missing_checkpoint)]
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed == "error: no image: nosuch.jpg, neither.png does not exist\n"


def without(content, key):
    """A copy of a dict that lacks one key."""
    copied = dict(content)
    del copied[key]
    return copied


def changed_config(content, key, value):
    """A copy of a checkpoint's content with a section or a setting of its config changed."""
    config = copy.deepcopy(content["config"])
    section, _, name = key.partition(".")
    if name:
        config[section][name] = value
    else:
        config[section] = value
    return {**content, "config": config}


WRONG_SETTINGS = (
    ("model.name", 3),
    ("model.name", "resnet99"),
    ("model.attention", True),
    ("data.val_crop_size", "wide"),
    ("data", 4),
)


def wrong_contents(content):
    """Names and contents with one part missing or of a wrong type."""
    # What is no mistake: a run may have no averaged weights, and a step is a whole number.
    allowed = [("ema", None), ("step", 5)]
    wrong_values = (None, 5, "text", [1], {"a": 1}, {1: torch.zeros(1)})
    for part in ("step", "model", "ema", "config", "class_names"):
        yield f"without {part}", without(content, part)
        for value in wrong_values:
            if (part, value) not in allowed:
                yield f"{part} {value!r}", {**content, part: value}

    model = content["model"]
    first = next(iter(model))
    fewer_tensors = without(model, first)
    other_shape = {**model, first: torch.zeros(2)}
    more_classes = [*content["class_names"], "x"]
    yield "tensor missing", {**content, "model": fewer_tensors, "ema": None}
    yield "tensor of another shape", {**content, "ema": other_shape}
    yield "one class more", {**content, "class_names": more_classes}

    for key, value in WRONG_SETTINGS:
        yield f"{key} {value!r}", changed_config(content, key, value)


@pytest.mark.slow
def test_parts_that_are_missing_or_wrong_are_one_sentence(checkpoint, digits, tmp_path, capfd):
    """Exit code 2 and no traceback, for each command in turn."""
    content = content_of(checkpoint)
    image = f"{digits}/val/3/0004.jpg"
    output = tmp_path / "out.safetensors"
    commands = itertools.cycle(
        [
            ["export", "--to", "safetensors", "--output", str(output)],
            ["predict", image],
            ["evaluate"],
        ]
    )
    path = tmp_path / "wrong.pt"
    problems = []
    for (name, wrong), command in zip(wrong_contents(content), commands, strict=False):
        torch.save(wrong, path)
        words = [*command, "--checkpoint", str(path)]
        if command[0] == "export":
            code = exit_code(words)
            printed = capfd.readouterr().err
        else:
            code, printed = run(tmp_path, *words)
        errors = [line for line in printed.splitlines() if line.startswith("error")]
        is_good = code == 2 and len(errors) == 1
        if not is_good or "Traceback" in printed or "damaged" in printed:
            problems.append(f"{name}, {command[0]}: code {code}: {printed[-600:]}")
    assert not output.exists()
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut off"])
def test_a_damaged_lone_file_is_refused_by_every_command(
    checkpoint, digits, tmp_path, damage, capfd
):
    """A file without a digest beside it."""
    path = tmp_path / "lone.pt"
    content = bytearray(Path(checkpoint).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[-10:]
    path.write_bytes(content)

    image = f"{digits}/val/3/0004.jpg"
    output = str(tmp_path / "x")
    for command in (
        ["evaluate"],
        ["predict", image],
        ["export", "--to", "safetensors", "--output", output],
    ):
        words = [*command, "--checkpoint", str(path)]
        assert exit_code(words) == 2
        printed = capfd.readouterr().err
        assert "lone.pt is damaged" in printed
        assert printed.count("\n") == 1

    for key in ("resume", "init_from"):
        folder = tmp_path / key
        code, printed = run(
            tmp_path,
            "train",
            *("--config", "quickstart"),
            *("--data.data_dir", digits),
            *("--output_dir", folder),
            *(f"--checkpoint.{key}", path),
            *("--log.wandb", "disabled"),
        )
        assert code == 2, printed
        assert "lone.pt is damaged" in printed, printed
        checkpoints = folder / "checkpoints"
        assert not checkpoints.exists()
