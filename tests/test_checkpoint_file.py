"""One file of weights: its digest inside and beside it, and what it must hold."""

import os
import random
import zipfile

import pytest
import torch
from checkpoint_utils import save_steps
from torch import nn

from resnet_dist.checkpoints.checkpoint_file import (
    NEEDED_TO_EVALUATE,
    NEEDED_TO_RESUME,
    digest_path,
    read_checkpoint,
    read_step,
    unpack_checkpoint,
    write_checkpoint,
)
from resnet_dist.checkpoints.run_folder import newest_valid


def load(path):
    return unpack_checkpoint(read_checkpoint(path), str(path))


def flipped(whole, place):
    return whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]


def places_in(whole):
    """In every part: headers, tensors, padding, the archive's list, the digest at the end."""
    fixed = {0, 1, 2, 3, len(whole) - 1, *range(len(whole) - 130, len(whole))}
    return sorted(fixed | {*range(0, len(whole), len(whole) // 150)})


@pytest.mark.slow
@pytest.mark.parametrize("lone", [False, True])
def test_a_bit_flipped_anywhere_is_found(tmp_path, lone):
    """Also in a lone file, whose only digest is the one inside."""
    save_steps(tmp_path, (1, 2))
    path = tmp_path / "step_00000002.pt"
    if lone:
        digest_path(path).unlink()
    whole = path.read_bytes()
    assert load(path)["step"] == 2
    for place in places_in(whole):
        path.write_bytes(flipped(whole, place))
        with pytest.raises(ValueError, match="damaged"):
            load(path)
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="damaged" if place else "empty"):
            load(path)
    path.write_bytes(whole)
    assert newest_valid(tmp_path, pytest.fail) == path


def test_sixty_random_flips_of_a_lone_file_are_found(tmp_path):
    save_steps(tmp_path, (1,))
    path = tmp_path / "step_00000001.pt"
    digest_path(path).unlink()
    whole = path.read_bytes()
    generator = random.Random(0)
    noticed = 0
    for _ in range(60):
        bit = generator.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            load(path)
        except ValueError:
            noticed += 1
    assert noticed == 60


def test_the_digest_inside_counts_and_others_can_read_the_file(tmp_path):
    """A wrong `.sha256` does not condemn a good file; torch and zip read it as any other."""
    save_steps(tmp_path, (7,))
    path = tmp_path / "step_00000007.pt"
    for text in ("", f"{'0' * 64}  step_00000007.pt\n", "nonsense"):
        digest_path(path).write_text(text)
        assert load(path)["step"] == 7
    assert read_step(path) == 7
    assert torch.load(path, weights_only=True, mmap=True)["step"] == 7
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_file_without_a_digest_is_said_to_be_unchecked(tmp_path):
    """Of another program, or of an older version whose `.sha256` is gone."""
    path = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    said = []
    read_checkpoint(path, said.append)
    assert len(said) == 1
    assert "foreign.pth has no SHA-256" in said[0]
    assert "unchecked" in said[0]
    save_steps(tmp_path, (1,))
    read_checkpoint(tmp_path / "step_00000001.pt", pytest.fail)
    read_checkpoint(tmp_path / "last.pt", pytest.fail)


@pytest.mark.slow
def test_every_part_is_there_and_of_its_kind(tmp_path):
    """Each part missing or of a wrong type is one sentence that names it."""
    save_steps(tmp_path, (1,))
    good = load(tmp_path / "step_00000001.pt")
    del good["sha256_in_zip_comment"]
    path = tmp_path / "changed.pt"
    problems = []

    def refused(content, part, needed):
        write_checkpoint(path, content)
        try:
            unpack_checkpoint(read_checkpoint(path), str(path), needed)
            problems.append(f"{part} was accepted")
        except ValueError as problem:
            if repr(part) not in str(problem) or "changed.pt" not in str(problem):
                problems.append(f"{part}: {problem}")

    for part in NEEDED_TO_RESUME:
        without = {key: value for key, value in good.items() if key != part}
        refused(without, part, NEEDED_TO_RESUME)
        if part in NEEDED_TO_EVALUATE:
            refused(without, part, NEEDED_TO_EVALUATE)
        for wrong in ([1, {}], {"a": 1, 2: 3}, {"model": [], "state": 3, "a": {1: 2}}, True):
            if part == "step":  # the name of the file would not be written
                continue
            if part in ("config", "scaler") and wrong == {"model": [], "state": 3, "a": {1: 2}}:
                continue
            refused({**good, part: wrong}, part, ())
    for step in ("3", None, 2.5, -2):
        torch.save({**good, "step": step}, path)
        with pytest.raises(ValueError, match="'step' is not a number of steps"):
            unpack_checkpoint(path.read_bytes(), str(path))
    assert problems == []


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"format": 99, "model": {}}, tmp_path / "newer.pt")
    torch.save({"format": 1, "model": nn.Linear(1, 1)}, tmp_path / "pickle.pt")
    for name, words in (
        ("text", "no file of torch.save"),
        ("other", "not a checkpoint"),
        ("newer", "format 99"),
        ("pickle", "Python objects"),
    ):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=words):
            unpack_checkpoint(read_checkpoint(path), str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "absent.pt")


def test_saving_over_a_damaged_file_does_not_bless_it(tmp_path, monkeypatch):
    """A kill before the rename leaves the damaged file with a digest that is not its own."""
    save_steps(tmp_path, (1, 2))
    (tmp_path / "step_00000002.pt").write_bytes(b"damaged")
    kill_at_rename(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "step_00000002.pt", {"format": 1, "model": {}, "step": 2})
    assert newest_valid(tmp_path, lambda text: None).name == "step_00000001.pt"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_between_the_renames_leaves_a_valid_file(tmp_path, monkeypatch, rename):
    """Saving a step again replaces the file and then its digest; at every moment it is valid."""
    save_steps(tmp_path, (1,))
    kill_at_rename(monkeypatch, rename)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "step_00000001.pt", {"format": 1, "model": {}, "step": 1})
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"


def kill_at_rename(monkeypatch, number):
    """Stop at the rename of that number, counted from 1: nothing after it runs."""
    real = os.replace
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
