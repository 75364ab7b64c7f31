"""The checkpoints of a run: the newest good one is found, and nothing older is taken in silence."""

import fcntl
import hashlib
import os
import shutil

import pytest
import torch
from checkpoint_utils import (
    FACTS,
    load_content,
    make_saver,
    make_state,
    name_of_newest,
    save,
    save_steps,
)

from resnet_dist.checkpoints import checkpoint, checkpoint_file
from resnet_dist.checkpoints.checkpoint_file import digest_path
from resnet_dist.checkpoints.run_folder import (
    Claim,
    find_checkpoint,
    find_step,
    newest_valid,
    refuse_lost,
    step_path,
)


def ignore(warning):
    """In place of the function that prints warnings."""


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "lone"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save_steps(tmp_path, (1, 2))
    newest = step_path(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        half = len(content) // 2
        del content[half:]
    elif damage == "empty":
        content.clear()
    else:
        content[len(content) // 3] ^= 1
    if damage == "lone":
        digest_path(newest).unlink()
    newest.write_bytes(content)

    warnings = []
    assert newest_valid(tmp_path, warnings.append) == step_path(tmp_path, 1)
    [warning] = warnings
    assert "step_00000002.pt" in warning
    assert "the one before" in warning


def test_nothing_valid_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert newest_valid(tmp_path, pytest.fail) is None
    assert newest_valid(tmp_path / "absent", pytest.fail) is None
    save_steps(tmp_path, (1,))
    step_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, ignore)


def test_a_newer_format_is_not_loaded_and_the_one_before_is(tmp_path, monkeypatch):
    save_steps(tmp_path, (1,))
    monkeypatch.setattr(checkpoint_file, "FORMAT", 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_steps(tmp_path, (2,))
    monkeypatch.undo()
    warnings = []
    assert newest_valid(tmp_path, warnings.append) == step_path(tmp_path, 1)
    assert "has format 2, this version reads up to 1" in warnings[0]
    assert "the one before" in warnings[0]


def test_a_folder_of_set_aside_ones_is_no_start_from_scratch(tmp_path):
    save_steps(tmp_path, (1, 2))
    step_path(tmp_path, 2).write_bytes(b"damaged")
    newest_valid(tmp_path, ignore)
    step_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, ignore)


def test_damaged_ones_are_set_aside_and_never_crowd_out_the_good(tmp_path):
    """After a fallback to step 1 the damaged step 9 is not among the newest that are kept."""
    save_steps(tmp_path, (1, 9))
    step_path(tmp_path, 9).write_bytes(b"damaged")
    assert newest_valid(tmp_path, ignore) == step_path(tmp_path, 1)
    set_aside = tmp_path / "step_00000009.pt.damaged"
    assert set_aside.read_bytes() == b"damaged"
    save_steps(tmp_path, (2,), keep=1)
    assert name_of_newest(tmp_path) == "step_00000002.pt"

    # Also not if a save finds it before it was set aside.
    step_path(tmp_path, 99).write_bytes(b"left behind")
    save_steps(tmp_path, (3,), keep=1)
    assert step_path(tmp_path, 3).exists()
    assert (tmp_path / "last.pt").exists()


def test_half_written_files_do_not_count(tmp_path):
    save_steps(tmp_path, (1,))
    half_written = tmp_path / "step_00000002.pt.tmp"
    half_written.write_bytes(b"PK half")
    assert name_of_newest(tmp_path) == "step_00000001.pt"
    # The next save that succeeds removes such files.
    save_steps(tmp_path, (3,))
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_folder_that_is_gone_is_no_new_run(tmp_path):
    """An old run's metrics without its checkpoint folder are an error; a run killed before its
    first save is none.
    """
    folder = tmp_path / "checkpoints"
    refuse_lost(folder)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="checkpoints/ is gone.*output_dir"):
        refuse_lost(folder)
    folder.mkdir()
    (folder / "attempt").write_text("1 x")
    refuse_lost(folder)


@pytest.mark.parametrize("left", ["last.pt", "best.pt", "saved"])
def test_checkpoints_that_are_all_gone_are_no_new_run(tmp_path, left):
    """The file `attempt` is there, and one trace of what was saved."""
    folder = tmp_path / "checkpoints"
    saver, _ = save_steps(folder, (3,), best=(3,))
    saver.claim()
    for path in folder.iterdir():
        if path.name not in (left, "attempt"):
            path.unlink()
    assert newest_valid(folder, pytest.fail) is None
    message = rf"are gone: {left} says.*Bring them back.*output_dir"
    with pytest.raises(ValueError, match=message):
        refuse_lost(folder)


def save_unsealed(folder, step):
    """A checkpoint as an older version wrote it: its digest is beside it, not inside."""
    state = checkpoint.copy_to_cpu(make_state().state_dict())
    content = {"format": 1, **FACTS, **state, "step": step}
    path = step_path(folder, step)
    torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes())
    checkpoint_file.write_digest(path, digest.hexdigest())


def exchange(one, two):
    """Exchange two files of a folder."""
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_name_that_claims_another_step_misleads_nobody(tmp_path, sealed):
    """Exchanged files, a name without a number, a name with a higher or lower one."""
    if sealed:
        save_steps(tmp_path, (1, 2, 3))
    else:
        for step in (1, 2, 3):
            save_unsealed(tmp_path, step)
    one = step_path(tmp_path, 1)
    two = step_path(tmp_path, 2)
    three = step_path(tmp_path, 3)
    without_number = tmp_path / "step_zzz.pt"

    exchange(two, three)
    exchange(digest_path(two), digest_path(three))
    told = []
    assert newest_valid(tmp_path, told.append) == two
    assert f"{two} holds the state of step 3" in "\n".join(told)

    two.rename(without_number)
    digest_path(two).unlink()
    told.clear()
    assert newest_valid(tmp_path, told.append) == without_number
    assert "step_zzz.pt holds the state of step 3" in "\n".join(told)

    without_number.unlink()
    one.rename(step_path(tmp_path, 8))
    told.clear()
    assert newest_valid(tmp_path, told.append) == three, "which holds step 2"
    assert told


def test_a_run_goes_on_from_a_file_under_a_wrong_name(tmp_path):
    """It is found for the links, and later saves neither fail nor remove it while it counts."""
    save_steps(tmp_path, (1, 2), best=(2,))
    wrong_name = "step_zzz.pt"
    step_path(tmp_path, 2).rename(tmp_path / wrong_name)
    newest = newest_valid(tmp_path, ignore)
    state = make_state()
    state.load_state_dict(load_content(newest))
    saver, warnings = make_saver(tmp_path, keep=1)
    saver.note_saved(state)
    saver.claim()
    assert os.readlink(tmp_path / "last.pt") == wrong_name
    assert os.readlink(tmp_path / "best.pt") == wrong_name

    state.step = 3
    save(saver, state)
    assert not warnings
    assert find_step(tmp_path, 2).name == wrong_name
    assert os.readlink(tmp_path / "best.pt") == wrong_name


def test_a_run_folder_stands_for_one_of_its_checkpoints(tmp_path):
    """The best for its network, the newest for a resume; nothing is renamed or written."""
    run = tmp_path / "run"
    folder = run / "checkpoints"
    save_steps(folder, (1, 2, 3), best=(2,))
    one = step_path(folder, 1)
    two = step_path(folder, 2)
    three = step_path(folder, 3)
    for place in (run, folder):
        assert find_checkpoint(place, pytest.fail) == two
        assert find_checkpoint(place, pytest.fail, best=False) == three
    last = folder / "last.pt"
    assert find_checkpoint(last, pytest.fail) == last

    # Without a best one, the newest; of damaged ones, the one before.
    before = sorted(os.listdir(folder))
    told = []
    two.write_bytes(b"damaged")
    assert find_checkpoint(run, told.append) == three
    assert len(told) == 1
    assert "taking the newest instead, step 3" in told[0]
    three.write_bytes(b"damaged")
    told.clear()
    assert find_checkpoint(run, told.append, best=False) == one
    assert len(told) == 2
    assert sorted(os.listdir(folder)) == before

    one.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        find_checkpoint(run, told.append)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint: name the folder of a run"):
        find_checkpoint(empty, pytest.fail)

    # A folder that holds a copy of the best one alone.
    shutil.rmtree(folder)
    save_steps(folder, (5,))
    copied = run / "best.pt"
    shutil.copy(last, copied)
    shutil.rmtree(folder)
    assert find_checkpoint(run, pytest.fail) == copied


DAMAGED_ATTEMPTS = (
    b"\0" * 30,
    b"",
    b"\n",
    b"not a number",
    b"\xff\xfe",
    b"1",
    b"1 host",
)


def test_a_damaged_attempt_is_named_and_mended(tmp_path):
    """When no other run is alive. A run that is alive mends its own file."""
    path = tmp_path / "attempt"
    still_alive = rf"{path} is damaged.*still alive: stop that run"
    for damage in DAMAGED_ATTEMPTS:
        told = []
        path.unlink(missing_ok=True)
        path.write_bytes(damage)
        claim = Claim(tmp_path, told.append)
        claim.take()
        [warning] = told
        assert f"{path} is damaged" in warning
        assert "written anew" in warning
        assert "\0" not in warning
        assert "\n" not in warning
        claim.check()

        # Damaged in place, while its owner is alive.
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=still_alive):
            Claim(tmp_path, told.append).take()
        assert path.read_bytes() == damage
        claim.check()
        assert path.read_text() == claim.text
        assert len(told) == 2

        # The end of a process does this.
        os.close(claim.lock)
        claim.lock = -1
    Claim(tmp_path, pytest.fail).take()


def test_a_newer_attempt_wins_and_says_its_number(tmp_path):
    claims = [Claim(tmp_path, pytest.fail) for _ in range(3)]
    for number, claim in enumerate(claims, 1):
        claim.take()
        assert claim.text.startswith(f"{number} ")
        permissions = (tmp_path / "attempt").stat().st_mode & 0o777
        assert permissions == 0o666 & ~current_umask()

    first, second, newest = claims
    newest.check()
    for old in (first, second):
        with pytest.raises(ValueError, match="belongs to a newer attempt, 3 "):
            old.check()
    shutil.rmtree(tmp_path)
    first.check()


def test_a_file_system_without_locks_does_not_matter(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "attempt").write_bytes(b"")
    told = []
    Claim(tmp_path, told.append).take()
    assert len(told) == 1
    Claim(tmp_path, pytest.fail).take()


def current_umask():
    """The umask of this process, which can be read only by setting it."""
    before = os.umask(0)
    os.umask(before)
    return before
