"""What evaluate, predict and export make of run folders, foreign and damaged checkpoints."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from dist_utils import run_command

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import (
    read_checkpoint,
    unpack_checkpoint,
    write_checkpoint,
)

SETTINGS = ("--data.threads", "1", "--distributed.threads", "1")


def run(folder, *words):
    return run_command(folder, [*words, *SETTINGS])


def content_of(checkpoint):
    content = unpack_checkpoint(read_checkpoint(Path(checkpoint)), "")
    # So that a file without a digest at its end is taken for that of an older version.
    del content["sha256_in_zip_comment"]
    return content


@pytest.mark.slow
def test_a_foreign_checkpoint_leads_nowhere(checkpoint, digits, tmp_path):
    """Nothing is written into the folders that it names, also for bad images and the digits."""
    content = content_of(checkpoint)
    named = tmp_path / "named"
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    for path in sorted((data / "val" / "3").iterdir())[:2]:
        path.write_bytes(b"")
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

    kind = ("--data.kind", "folder", "--data.data_dir", data)
    code, printed = run(tmp_path, "evaluate", "--checkpoint", path, "--json", *kind)
    assert code == 0
    assert json.loads(printed.splitlines()[-1])["bad_images"] == 2
    code, printed = run(tmp_path, "evaluate", "--checkpoint", path, *kind)
    assert code == 0
    assert "2 images cannot be decoded and count as misses" in printed
    image = next(iter((data / "val" / "4").glob("*.jpg")))
    assert run(tmp_path, "predict", image, "--checkpoint", path)[0] == 0
    assert not named.exists()
    assert not list(tmp_path.rglob("quarantine.jsonl"))


@pytest.mark.slow
def test_a_run_folder_is_taken_everywhere(checkpoint, digits, tmp_path):
    """By evaluate, predict, export, checkpoint.resume and checkpoint.init_from."""
    folder = Path(checkpoint).parents[1]
    image = f"{digits}/val/3/0004.jpg"
    assert run(tmp_path, "predict", image, "--checkpoint", folder)[0] == 0
    output = tmp_path / "x.safetensors"
    command = ("export", "--checkpoint", folder, "--to", "safetensors", "--output", output)
    assert run(tmp_path, *command)[0] == 0
    assert output.exists()
    train = ("train", "--config", folder / "config.yaml", "--data.data_dir", digits)
    code, printed = run(
        tmp_path, *train, "--output_dir", tmp_path / "a", "--checkpoint.init_from", folder
    )
    assert code == 0, printed
    assert "step 0, with the weights of" in printed, printed
    code, printed = run(
        tmp_path, *train, "--output_dir", tmp_path / "b", "--checkpoint.resume", folder
    )
    assert code == 0, printed
    assert "step 2, from" in printed, printed
    code, printed = run(
        tmp_path, *train, "--output_dir", tmp_path / "c", "--checkpoint.resume", tmp_path
    )
    assert code == 2
    assert "holds no checkpoint" in printed
    assert "Traceback" not in printed


def test_a_wrong_image_is_noticed_before_the_network_is_read(tmp_path, monkeypatch, capsys):
    """Here there is not even a checkpoint."""
    words = ["predict", "nosuch.jpg", "neither.png", "--checkpoint", str(tmp_path / "gone.pt")]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "error: no image: nosuch.jpg, neither.png does not exist\n"


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


def variants(content):
    """Names and contents with one part missing or of a wrong type."""
    for part in ("step", "model", "ema", "config", "class_names"):
        yield f"without {part}", without(content, part)
        for wrong in (None, 5, "text", [1], {"a": 1}, {1: torch.zeros(1)}):
            is_right = (part == "ema" and wrong is None) or (part == "step" and wrong == 5)
            if not is_right:
                yield f"{part} {wrong!r}", {**content, part: wrong}
    model = content["model"]
    first = next(iter(model))
    yield "tensor missing", {**content, "model": without(model, first), "ema": None}
    yield "tensor of another shape", {**content, "ema": {**model, first: torch.zeros(2)}}
    yield "one class more", {**content, "class_names": [*content["class_names"], "x"]}
    wrong_settings = (
        ("model.name", 3),
        ("model.name", "resnet99"),
        ("model.attention", True),
        ("data.val_crop_size", "wide"),
        ("data", 4),
    )
    for key, wrong in wrong_settings:
        yield f"{key} {wrong!r}", {**content, "config": changed(content["config"], key, wrong)}


def changed(config, key, value):
    section, _, name = key.partition(".")
    if not name:
        return {**config, section: value}
    return {**config, section: {**config[section], name: value}}


@pytest.mark.slow
def test_parts_that_are_missing_or_wrong_are_one_sentence(checkpoint, digits, tmp_path, capfd):
    """Exit code 2 and no traceback, for each command in turn."""
    content = content_of(checkpoint)
    image = f"{digits}/val/3/0004.jpg"
    output = tmp_path / "out.safetensors"
    commands = (
        ["export", "--to", "safetensors", "--output", str(output)],
        ["predict", image],
        ["evaluate"],
    )
    problems = []
    for number, (name, wrong) in enumerate(variants(content)):
        path = tmp_path / "wrong.pt"
        torch.save(wrong, path)
        words = [*commands[number % len(commands)], "--checkpoint", str(path)]
        if words[0] == "export":
            code = exit_code(words)
            printed = capfd.readouterr().err
        else:
            code, printed = run(tmp_path, *words)
        lines = [line for line in printed.splitlines() if line.startswith("error")]
        if code != 2 or len(lines) != 1 or "Traceback" in printed or "damaged" in printed:
            problems.append(f"{name}, {words[0]}: code {code}: {printed[-600:]}")
    assert not output.exists()
    assert problems == []


def exit_code(words):
    try:
        return cli.main(words)
    except SystemExit as ending:
        return ending.code


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut off"])
def test_a_damaged_lone_file_is_refused_by_every_command(
    checkpoint, digits, tmp_path, damage, capfd
):
    path = tmp_path / "lone.pt"
    content = bytearray(Path(checkpoint).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[-10:]
    path.write_bytes(content)
    image = f"{digits}/val/3/0004.jpg"
    output = str(tmp_path / "x")
    for words in (
        ["evaluate"],
        ["predict", image],
        ["export", "--to", "safetensors", "--output", output],
    ):
        assert exit_code([*words, "--checkpoint", str(path)]) == 2
        err = capfd.readouterr().err
        assert "lone.pt is damaged" in err
        assert err.count("\n") == 1
    for key in ("resume", "init_from"):
        folder = tmp_path / key
        code, printed = run(
            tmp_path,
            "train",
            "--config",
            "quickstart",
            *("--data.data_dir", digits, "--output_dir", folder, f"--checkpoint.{key}", path),
            *("--log.wandb", "disabled"),
        )
        assert code == 2, printed
        assert "lone.pt is damaged" in printed, printed
        assert not os.path.exists(folder / "checkpoints")
