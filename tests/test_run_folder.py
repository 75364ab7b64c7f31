"""The checkpoints of a run: the newest good one is found, and nothing older is taken in silence."""

import fcntl
import os
import shutil

import pytest
import torch
from checkpoint_utils import FACTS, make_saver, make_state, save_steps

from resnet_dist.checkpoints import checkpoint, checkpoint_file
from resnet_dist.checkpoints.checkpoint_file import digest_path, read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.run_folder import (
    Claim,
    find_checkpoint,
    find_step,
    newest_valid,
    refuse_lost,
    step_path,
)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "lone"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save_steps(tmp_path, (1, 2))
    path = tmp_path / "step_00000002.pt"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 1
    elif damage == "truncate":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content[len(content) // 3] ^= 1
        digest_path(path).unlink()
    path.write_bytes(content)
    warnings = []
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "step_00000001.pt"
    assert len(warnings) == 1
    assert "step_00000002.pt" in warnings[0]
    assert "the one before" in warnings[0]


def test_nothing_valid_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert newest_valid(tmp_path, pytest.fail) is None
    assert newest_valid(tmp_path / "absent", pytest.fail) is None
    save_steps(tmp_path, (1,))
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, lambda text: None)


def test_a_newer_format_is_not_loaded_and_the_one_before_is(tmp_path, monkeypatch):
    save_steps(tmp_path, (1,))
    monkeypatch.setattr(checkpoint_file, "FORMAT", 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_steps(tmp_path, (2,))
    monkeypatch.undo()
    warnings = []
    assert newest_valid(tmp_path, warnings.append).name == "step_00000001.pt"
    assert "has format 2, this version reads up to 1" in warnings[0]
    assert "the one before" in warnings[0]


def test_a_folder_of_set_aside_ones_is_no_start_from_scratch(tmp_path):
    save_steps(tmp_path, (1, 2))
    (tmp_path / "step_00000002.pt").write_bytes(b"damaged")
    newest_valid(tmp_path, lambda text: None)
    (tmp_path / "step_00000001.pt").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, lambda text: None)


def test_damaged_ones_are_set_aside_and_never_crowd_out_the_good(tmp_path):
    """After a fallback to step 1 the damaged step 9 is not among the newest that are kept."""
    save_steps(tmp_path, (1, 9))
    (tmp_path / "step_00000009.pt").write_bytes(b"damaged")
    assert newest_valid(tmp_path, lambda text: None).name == "step_00000001.pt"
    assert (tmp_path / "step_00000009.pt.damaged").read_bytes() == b"damaged"
    save_steps(tmp_path, (2,), keep=1)
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000002.pt"
    (tmp_path / "step_00000099.pt").write_bytes(b"left behind")
    save_steps(tmp_path, (3,), keep=1)
    assert (tmp_path / "step_00000003.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_half_written_files_do_not_count(tmp_path):
    save_steps(tmp_path, (1,))
    (tmp_path / "step_00000002.pt.tmp").write_bytes(b"PK half")
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"
    save_steps(tmp_path, (3,))  # the next save that succeeds sweeps them up
    assert not list(tmp_path.glob("*.tmp"))


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
    with pytest.raises(ValueError, match=rf"are gone: {left} says.*Bring them back.*output_dir"):
        refuse_lost(folder)


def unsealed(folder, step, name):
    """A checkpoint as an older version wrote it: its digest is beside it, not inside."""
    content = {"format": 1, **FACTS, **checkpoint.copy_to_cpu(make_state().state_dict())}
    path = folder / name
    torch.save({**content, "step": step}, path)
    checkpoint_file.write_digest(
        path, checkpoint_file.hashlib.sha256(path.read_bytes()).hexdigest()
    )
    return path


def swap(folder, one, two):
    """Exchange two checkpoints with their digests, as after wrong renames."""
    for path, other in ((one, two), (digest_path(one), digest_path(two))):
        path.rename(folder / "aside")
        other.rename(path)
        (folder / "aside").rename(other)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_name_that_claims_another_step_misleads_nobody(tmp_path, sealed):
    """Swapped files, a name without a number, a name with a higher or lower one."""
    if sealed:
        save_steps(tmp_path, (1, 2, 3))
    else:
        for step in (1, 2, 3):
            unsealed(tmp_path, step, f"step_{step:08d}.pt")
    one, two, three = (step_path(tmp_path, step) for step in (1, 2, 3))
    swap(tmp_path, two, three)
    told = []
    assert newest_valid(tmp_path, told.append) == two
    assert any(f"{two} holds the state of step 3" in text for text in told)
    two.rename(tmp_path / "step_zzz.pt")
    digest_path(two).unlink()
    told.clear()
    assert newest_valid(tmp_path, told.append).name == "step_zzz.pt"
    assert any("step_zzz.pt holds the state of step 3" in text for text in told)
    (tmp_path / "step_zzz.pt").unlink()
    one.rename(step_path(tmp_path, 8))
    told.clear()
    assert newest_valid(tmp_path, told.append) == three, "which holds step 2"
    assert told


def test_a_run_goes_on_from_a_file_under_a_wrong_name(tmp_path):
    """It is found for the links, and later saves neither fail nor remove it while it counts."""
    save_steps(tmp_path, (1, 2), best=(2,))
    step_path(tmp_path, 2).rename(tmp_path / "step_zzz.pt")
    newest = newest_valid(tmp_path, lambda text: None)
    state = make_state()
    state.load_state_dict(unpack_checkpoint(read_checkpoint(newest), "newest"))
    saver, warnings = make_saver(tmp_path, keep=1)
    saver.note_saved(state)
    saver.claim()
    assert {os.readlink(tmp_path / name) for name in ("last.pt", "best.pt")} == {"step_zzz.pt"}
    state.step = 3
    saver.save(state)
    saver.wait()
    assert not warnings
    assert find_step(tmp_path, 2).name == "step_zzz.pt"
    assert os.readlink(tmp_path / "best.pt") == "step_zzz.pt"


def test_a_run_folder_stands_for_one_of_its_checkpoints(tmp_path):
    """The best for its network, the newest for a resume; nothing is renamed or written."""
    run = tmp_path / "run"
    folder = run / "checkpoints"
    save_steps(folder, (1, 2, 3), best=(2,))
    for place in (run, folder):
        assert find_checkpoint(place, pytest.fail) == step_path(folder, 2)
        assert find_checkpoint(place, pytest.fail, best=False) == step_path(folder, 3)
    assert find_checkpoint(folder / "last.pt", pytest.fail) == folder / "last.pt"
    told = []
    step_path(folder, 2).write_bytes(b"damaged")
    before = sorted(os.listdir(folder))
    assert find_checkpoint(run, told.append) == step_path(folder, 3)
    assert len(told) == 1
    assert "taking the newest instead, step 3" in told[0]
    step_path(folder, 3).write_bytes(b"damaged")
    told.clear()
    assert find_checkpoint(run, told.append, best=False) == step_path(folder, 1)
    assert len(told) == 2
    assert sorted(os.listdir(folder)) == before
    step_path(folder, 1).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        find_checkpoint(run, told.append)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint: name the folder of a run"):
        find_checkpoint(tmp_path / "empty", pytest.fail)
    shutil.rmtree(folder)
    save_steps(folder, (5,))
    shutil.copy(folder / "last.pt", run / "best.pt")
    shutil.rmtree(folder)
    assert find_checkpoint(run, pytest.fail) == run / "best.pt"


DAMAGES = (b"\0" * 30, b"", b"\n", b"not a number", b"\xff\xfe", b"1", b"1 host")


def test_a_damaged_attempt_is_named_and_mended(tmp_path):
    """When no other run is alive. A run that is alive mends its own file."""
    path = tmp_path / "attempt"
    for damage in DAMAGES:
        told = []
        path.unlink(missing_ok=True)
        path.write_bytes(damage)
        claim = Claim(tmp_path, told.append)
        claim.take()
        assert len(told) == 1
        assert f"{path} is damaged" in told[0]
        assert "written anew" in told[0]
        assert "\0" not in told[0]
        assert "\n" not in told[0]
        claim.check()
        path.write_bytes(damage)  # in place, while its owner is alive
        with pytest.raises(ValueError, match=rf"{path} is damaged.*still alive: stop that run"):
            Claim(tmp_path, told.append).take()
        assert path.read_bytes() == damage
        claim.check()
        assert path.read_text() == claim.text
        assert len(told) == 2
        os.close(claim.lock)  # as its end does
        claim.lock = -1
    Claim(tmp_path, pytest.fail).take()


def test_a_newer_attempt_wins_and_says_its_number(tmp_path):
    claims = [Claim(tmp_path, pytest.fail) for _ in range(3)]
    for number, claim in enumerate(claims, 1):
        claim.take()
        assert claim.text.startswith(f"{number} ")
        assert (tmp_path / "attempt").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    claims[2].check()
    for old in claims[:2]:
        with pytest.raises(ValueError, match="belongs to a newer attempt, 3 "):
            old.check()
    shutil.rmtree(tmp_path)
    claims[0].check()


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
    before = os.umask(0)
    os.umask(before)
    return before
