"""One file of weights: its digest inside and beside it, and what it must hold."""

import os
import random
import zipfile

import pytest
import torch
from checkpoint_utils import load_content, name_of_newest, save_steps
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


def with_flipped_bit(content, bit):
    """A copy of some bytes with one bit flipped."""
    changed = bytearray(content)
    place, bit_of_byte = divmod(bit, 8)
    changed[place] ^= 1 << bit_of_byte
    return bytes(changed)


def places_in(content):
    """In every part: headers, tensors, padding, the archive's list, the digest at the end."""
    size = len(content)
    first = range(4)
    last = range(size - 130, size)
    between = range(0, size, size // 150)
    return sorted({*first, *between, *last})


@pytest.mark.slow
@pytest.mark.parametrize("lone", [False, True])
def test_a_bit_flipped_anywhere_is_found(tmp_path, lone):
    """Also in a lone file, whose only digest is the one inside. A file that is cut off is found as
    well.
    """
    save_steps(tmp_path, (1, 2))
    path = tmp_path / "step_00000002.pt"
    if lone:
        digest_path(path).unlink()
    whole = path.read_bytes()
    assert load_content(path)["step"] == 2

    for place in places_in(whole):
        bit_of_byte = place % 8
        path.write_bytes(with_flipped_bit(whole, 8 * place + bit_of_byte))
        with pytest.raises(ValueError, match="damaged"):
            load_content(path)

        path.write_bytes(whole[:place])
        expected = "damaged" if place > 0 else "empty"
        with pytest.raises(ValueError, match=expected):
            load_content(path)
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
        path.write_bytes(with_flipped_bit(whole, bit))
        try:
            load_content(path)
        except ValueError:
            noticed += 1
    assert noticed == 60


def test_the_digest_inside_counts_and_others_can_read_the_file(tmp_path):
    """A wrong `.sha256` does not condemn a good file; torch and zip read it as any other."""
    save_steps(tmp_path, (7,))
    path = tmp_path / "step_00000007.pt"
    zeros = "0" * 64
    for text in ("", f"{zeros}  step_00000007.pt\n", "nonsense"):
        digest_path(path).write_text(text)
        assert load_content(path)["step"] == 7
    assert read_step(path) == 7
    content = torch.load(path, weights_only=True, mmap=True)
    assert content["step"] == 7
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_file_without_a_digest_is_said_to_be_unchecked(tmp_path):
    """Of another program, or of an older version whose `.sha256` is gone."""
    path = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    warnings = []
    read_checkpoint(path, warnings.append)
    [warning] = warnings
    assert "foreign.pth has no SHA-256" in warning
    assert "unchecked" in warning

    # Our own files have one.
    save_steps(tmp_path, (1,))
    read_checkpoint(tmp_path / "step_00000001.pt", pytest.fail)
    read_checkpoint(tmp_path / "last.pt", pytest.fail)


# Values of a wrong type for the parts of a checkpoint. The last one has only text as keys, as a
# config and the state of a scaler have.
WRONG_PARTS = (
    [1, {}],
    {"a": 1, 2: 3},
    True,
    {"model": [], "state": 3, "a": {1: 2}},
)


def wrong_values_of(part):
    """Values that are not of the type of a part."""
    if part == "step":
        # The name of the file would not be written.
        return ()
    if part in ("config", "scaler"):
        return WRONG_PARTS[:-1]
    return WRONG_PARTS


def find_problem(path, part, needed):
    """What is wrong with the error for a checkpoint whose `part` is; None if nothing is."""
    try:
        unpack_checkpoint(read_checkpoint(path), str(path), needed)
    except ValueError as error:
        message = str(error)
        if repr(part) in message and path.name in message:
            return None
        return f"{part}: {message}"
    return f"{part} was accepted"


@pytest.mark.slow
def test_every_part_is_there_and_of_its_kind(tmp_path):
    """Each part missing or of a wrong type is one sentence that names it."""
    save_steps(tmp_path, (1,))
    good = load_content(tmp_path / "step_00000001.pt")
    del good["sha256_in_zip_comment"]
    path = tmp_path / "changed.pt"
    problems = []
    for part in NEEDED_TO_RESUME:
        without_part = dict(good)
        del without_part[part]
        write_checkpoint(path, without_part)
        problems.append(find_problem(path, part, NEEDED_TO_RESUME))
        if part in NEEDED_TO_EVALUATE:
            problems.append(find_problem(path, part, NEEDED_TO_EVALUATE))
        for wrong in wrong_values_of(part):
            write_checkpoint(path, {**good, part: wrong})
            problems.append(find_problem(path, part, needed=()))
    assert [problem for problem in problems if problem is not None] == []

    for step in ("3", None, 2.5, -2):
        torch.save({**good, "step": step}, path)
        with pytest.raises(ValueError, match="'step' is not a number of steps"):
            unpack_checkpoint(path.read_bytes(), str(path))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    text = tmp_path / "text.pt"
    other = tmp_path / "other.pt"
    newer = tmp_path / "newer.pt"
    pickle = tmp_path / "pickle.pt"
    text.write_text("hello")
    torch.save({"weights": 1}, other)
    torch.save({"format": 99, "model": {}}, newer)
    torch.save({"format": 1, "model": nn.Linear(1, 1)}, pickle)
    for path, words in (
        (text, "no file of torch.save"),
        (other, "not a checkpoint"),
        (newer, "format 99"),
        (pickle, "Python objects"),
    ):
        with pytest.raises(ValueError, match=words):
            load_content(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "absent.pt")


def kill_at_rename(monkeypatch, number):
    """Stop at the rename of that number, counted from 1: nothing after it runs."""
    real_replace = os.replace
    num_renames = 0

    def replace_or_stop(source, target):
        nonlocal num_renames
        num_renames += 1
        if num_renames == number:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)


def test_saving_over_a_damaged_file_does_not_bless_it(tmp_path, monkeypatch):
    """A kill before the rename leaves the damaged file with a digest that is not its own."""
    save_steps(tmp_path, (1, 2))
    damaged = tmp_path / "step_00000002.pt"
    damaged.write_bytes(b"damaged")
    kill_at_rename(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(damaged, {"format": 1, "model": {}, "step": 2})
    newest = newest_valid(tmp_path, lambda text: None)
    assert newest.name == "step_00000001.pt"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_between_the_renames_leaves_a_valid_file(tmp_path, monkeypatch, rename):
    """Saving a step again replaces the file and then its digest; at every moment it is valid."""
    save_steps(tmp_path, (1,))
    path = tmp_path / "step_00000001.pt"
    kill_at_rename(monkeypatch, rename)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, {"format": 1, "model": {}, "step": 1})
    assert name_of_newest(tmp_path) == "step_00000001.pt"
