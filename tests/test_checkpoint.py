"""The state of a run: saved whole or not at all, and nothing about it is lost in silence."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_utils import (
    load_content,
    load_newest,
    make_saver,
    make_state,
    name_of_newest,
    save,
    save_steps,
)
from dist_utils import equal_trees
from torch import nn

from resnet_dist import files
from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.checkpoints.checkpoint_file import digest_path, read_checkpoint
from resnet_dist.checkpoints.resume_rules import flatten
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.config import OptimConfig
from resnet_dist.optim import build_optimizer


def steps_in(folder):
    """The steps of a folder's checkpoints, in order."""
    steps = []
    for path in folder.glob("step_*.pt"):
        number = path.stem.removeprefix("step_")
        steps.append(int(number))
    return sorted(steps)


def size_of_one(folder, step):
    """The bytes that the checkpoint of a step takes."""
    path = folder / f"step_{step:08d}.pt"
    return path.stat().st_size


def run_sha256sum(folder):
    """Let coreutils check all digests of a folder; returns their number and the exit code."""
    digests = [path.name for path in folder.glob("*.sha256")]
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", *digests],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    return len(digests), done.returncode


def train_one_step(state):
    """One update, so that the optimizer, the scaler and the average have something to keep."""
    images = torch.randn(4, 3, 5, 5)
    loss = state.model(images).sum()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.ema.update()


def test_everything_comes_back(tmp_path):
    saver, warnings = make_saver(tmp_path)
    saved = make_state(precision="fp16")
    train_one_step(saved)
    saved.step = 7
    saved.evaluated_step = 5
    saved.best_top1 = 42.0
    saved.best_step = 5
    save(saver, saved)
    assert not warnings

    loaded = make_state(seed=1, precision="fp16")
    loaded.load_state_dict(load_content(tmp_path / "last.pt"))
    assert loaded.step == 7
    assert loaded.evaluated_step == 5
    assert loaded.best_top1 == 42.0
    assert loaded.best_step == 5

    expected = saved.state_dict()
    found = loaded.state_dict()
    for part in ("model", "ema"):
        assert expected[part]
        assert equal_trees(found[part], expected[part]), part
    # The settings in the optimizer's groups come from the config, so its buffers are compared.
    assert equal_trees(
        flatten(found["optimizer"]["state"]),
        flatten(expected["optimizer"]["state"]),
    )
    assert expected["scaler"]
    assert found["scaler"] == expected["scaler"]


def test_the_snapshot_is_of_the_moment_of_the_call(tmp_path):
    """Training goes on while the file is written: later weights do not get into it."""
    saver, _ = make_saver(tmp_path)
    state = make_state()
    first_weight = next(state.model.parameters())
    before = first_weight.detach().clone()

    saver.save(state)
    with torch.no_grad():
        first_weight.zero_()
    saver.wait()

    content = load_content(tmp_path / "step_00000000.pt")
    first_saved = next(iter(content["model"].values()))
    assert torch.equal(first_saved, before)


def test_keeps_the_newest_and_the_best_and_links_them(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, best=(3,))
    assert steps_in(tmp_path) == [3, 6, 7]
    assert os.readlink(tmp_path / "best.pt") == "step_00000003.pt"
    newest = load_content(tmp_path / "last.pt")
    assert newest["step"] == 7

    num_digests, exit_code = run_sha256sum(tmp_path)
    assert num_digests == 3
    assert exit_code == 0


def test_the_optimizers_settings_are_the_present_ones():
    """The momentum buffers come from the file. Learning rate, decay and momentum come from the
    config of the run that resumes.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 2)

    def state_with(config):
        optimizer = build_optimizer(config, model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainState(model, optimizer, scaler)

    saved = state_with(OptimConfig(momentum=0.9, weight_decay=1e-4))
    saved.optimizer.state[model.weight]["momentum_buffer"].fill_(7.0)
    with_momentum = saved.state_dict()
    without_momentum = saved.state_dict()
    without_momentum["optimizer"]["state"] = {}

    for content, expected_momentum in (
        (with_momentum, 7.0),
        (without_momentum, 0.0),
    ):
        state = state_with(OptimConfig(momentum=0.8, weight_decay=5e-4))
        state.load_state_dict(content)
        group = state.optimizer.param_groups[0]
        assert group["weight_decay"] == 5e-4
        assert group["momentum"] == 0.8
        buffer = state.optimizer.state[model.weight]["momentum_buffer"]
        assert buffer.unique().tolist() == [expected_momentum]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full"
)
def test_a_full_disk_is_a_warning_and_the_old_file_stays(tmp_path, monkeypatch):
    saver, warnings = save_steps(tmp_path, (1,))
    real_open = open

    def open_on_full_disk(path, *args, **options):
        name = str(path)
        if ".pt." in name and name.endswith(".tmp"):
            path = "/dev/full"
        return real_open(path, *args, **options)

    monkeypatch.setattr("builtins.open", open_on_full_disk)
    state = make_state()
    state.step = 2
    save(saver, state)
    [warning] = warnings
    assert "step 2" in warning
    assert "step 1 stays" in warning
    assert "No space left on device" in warning
    assert saver.failure
    assert name_of_newest(tmp_path) == "step_00000001.pt"

    # With room again, the next save succeeds.
    monkeypatch.undo()
    state.step = 3
    save(saver, state)
    assert not saver.failure
    assert name_of_newest(tmp_path) == "step_00000003.pt"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    saver, warnings = save_steps(tmp_path, (1,))
    state = make_state()
    state.step = 2
    first_weight = next(state.model.parameters())
    with torch.no_grad():
        first_weight[0] = float("nan")
    save(saver, state)
    assert "not finite" in warnings[0]
    assert steps_in(tmp_path) == [1]


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    saver, warnings = save_steps(folder, (1,))
    subprocess.run(["rm", "-r", str(folder)], check=True)
    state = make_state()
    state.step = 2
    save(saver, state)
    assert not warnings
    assert newest_valid(folder, pytest.fail)


@pytest.mark.parametrize("newer_attempt", [False, True])
@pytest.mark.parametrize("rename", [1, 2])
def test_a_folder_that_vanishes_while_it_is_written_is_made_again(
    tmp_path, monkeypatch, rename, newer_attempt
):
    """The folder vanishes before a rename: the first is of the file, the second of its digest.

    If a newer attempt has made the folder again, it stays as it is. A file that was complete
    before the folder vanished counts.
    """
    folder = tmp_path / "checkpoints"
    moved = tmp_path / "moved"
    saver, warnings = save_steps(folder, (1,))
    saver.claim()
    other, _ = make_saver(folder)
    real_replace = os.replace
    num_renames = 0

    def replace_in_vanished_folder(source, target):
        nonlocal num_renames
        num_renames += 1
        if num_renames == rename:
            folder.rename(moved)
            if newer_attempt:
                other.claim()
        real_replace(source, target)

    state = make_state()
    state.step = 2
    monkeypatch.setattr(os, "replace", replace_in_vanished_folder)
    save(saver, state)

    was_complete = rename == 2
    if was_complete:
        assert name_of_newest(moved) == "step_00000002.pt"
    else:
        # Whatever was in the folder is still readable where it went.
        newest_valid(moved, pytest.fail)
    if newer_attempt:
        assert os.listdir(folder) == ["attempt"]
    if newer_attempt and not was_complete:
        assert "newer attempt" in warnings[0]
    elif not was_complete:
        assert not warnings
        assert name_of_newest(folder) == "step_00000002.pt"


def mount_small_disk(folder, size):
    """Whether a file system of `size` bytes could be mounted on the folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def limit_the_disk(monkeypatch, folder, size):
    """Let writes fail once the checkpoints in the folder take more than `size` bytes."""
    real_fsync = os.fsync

    def fsync_with_limit(descriptor):
        used = 0
        for path in folder.glob("step_*.pt*"):
            used += path.stat().st_size
        if used > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync_with_limit)


@pytest.mark.parametrize("way", ["real", "simulated"])
def test_a_disk_with_room_for_two_keeps_the_newest(tmp_path, monkeypatch, way):
    """`keep` asks for three and two fit: each save frees the oldest, and none fails.

    The disk is a real file system of that size where one can be mounted, or a simulated one.
    """
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_steps(folder, (1,))
    size = size_of_one(folder, 1)
    (folder / "step_00000001.pt").unlink()

    # Two checkpoints, a page each for their digests, and one page less than a third needs. The
    # file `saved` takes a page of that rest.
    page = 4096
    pages = -(-size // page)
    room = page * (2 * (pages + 1) + pages)
    is_mounted = way == "real" and mount_small_disk(folder, room)
    if not is_mounted:
        limit_the_disk(monkeypatch, folder, 2 * size + size // 2)
    try:
        saver, warnings = save_steps(folder, range(1, 7), keep=3)
        assert warnings == []
        assert saver.failure is None
        assert steps_in(folder) == [5, 6]
        assert name_of_newest(folder) == "step_00000006.pt"

        _, warnings = save_steps(folder, range(7, 10), keep=3, best=range(7, 10))
        assert warnings == []
        assert steps_in(folder) == [8, 9]
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_the_best_one_is_never_removed_for_a_new_one(tmp_path, monkeypatch):
    """There is room for three, of which one is the best."""
    save_steps(tmp_path, (1, 2), best=(1,))
    size = size_of_one(tmp_path, 2)
    limit_the_disk(monkeypatch, tmp_path, 3 * size + size // 2)
    saver, warnings = make_saver(tmp_path)
    state = load_newest(tmp_path)
    saver.note_saved(state)
    for step in range(3, 7):
        state.step = step
        save(saver, state)
        assert not warnings
        assert steps_in(tmp_path) == [1, step - 1, step]


@pytest.mark.parametrize("best", [-1, 1])
def test_the_last_good_one_is_never_removed_for_a_new_one(tmp_path, monkeypatch, best):
    """There is room for one, or for two of which one is the best: the save fails, and all stay."""
    before = [2] if best == -1 else [1, 2]
    saver, _ = save_steps(tmp_path, before, best=(best,))
    size = size_of_one(tmp_path, 2)
    limit_the_disk(monkeypatch, tmp_path, len(before) * size + size // 2)

    state = make_state()
    state.step = 3
    state.best_step = best
    save(saver, state)
    assert "No space left" in saver.failure
    assert "step 2 stays" in saver.failure
    assert steps_in(tmp_path) == before
    for path in tmp_path.glob("step_*.pt"):
        read_checkpoint(path)


def damage_link(link, damage, old):
    """Replace a link as a kill or a mistake could have left it; `old` is an older checkpoint."""
    link.unlink()
    if damage == "gone":
        return
    if damage == "circle":
        link.symlink_to(link.name)
    elif damage == "a file":
        link.write_bytes(b"")
    else:
        link.symlink_to(old)


@pytest.mark.slow
def test_links_are_mended_at_every_start_and_save(tmp_path):
    """After a kill between writing the file and moving the links, and after any damage to them."""
    last = tmp_path / "last.pt"
    best = tmp_path / "best.pt"
    newest_digest = digest_path(tmp_path / "step_00000003.pt")
    save_steps(tmp_path, (1, 2, 3), best=(2,))
    for damage in ("old", "gone", "circle", "a file", "no digest", "stale digest"):
        damage_link(last, damage, old="step_00000001.pt")
        damage_link(best, damage, old="step_00000003.pt")
        if damage == "no digest":
            newest_digest.unlink()
        elif damage == "stale digest":
            zeros = "0" * 64
            newest_digest.write_text(f"{zeros}  step_00000003.pt")

        saver, warnings = make_saver(tmp_path)
        saver.note_saved(load_newest(tmp_path))
        saver.claim()
        assert os.readlink(last) == "step_00000003.pt", damage
        assert os.readlink(best) == "step_00000002.pt", damage
        _, exit_code = run_sha256sum(tmp_path)
        assert exit_code == 0, damage
        assert not warnings, damage

    last.unlink()
    best.unlink()
    state = load_newest(tmp_path)
    state.step = 4
    save(saver, state)
    assert os.readlink(last) == "step_00000004.pt"
    assert os.readlink(best) == "step_00000002.pt"


def test_a_best_link_that_leads_nowhere_is_removed(tmp_path):
    save_steps(tmp_path, (1, 2), best=(1,))
    (tmp_path / "step_00000001.pt").unlink()
    saver, _ = make_saver(tmp_path)
    saver.note_saved(load_newest(tmp_path))
    saver.claim()
    best = tmp_path / "best.pt"
    assert not best.is_symlink()
    assert os.readlink(tmp_path / "last.pt") == "step_00000002.pt"


def test_what_lies_in_the_folder_fails_no_save(tmp_path):
    """Folders have the names of temporary files, of links and of the digest, and a link leads to
    itself.
    """
    save_steps(tmp_path, (1,))
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink(missing_ok=True)
    for name in (
        "x.tmp",
        "step_00000009.pt.tmp",
        "step_00000002.pt.sha256",
        "last.pt",
        "best.pt",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000007.pt").symlink_to("step_00000007.pt")

    saver, warnings = save_steps(tmp_path, (2, 3), best=(3,))
    assert not warnings
    assert saver.failure is None
    assert read_checkpoint(tmp_path / "step_00000003.pt")
    told = []
    newest = newest_valid(tmp_path, told.append)
    assert newest.name == "step_00000003.pt"
    assert len(told) == 1
    assert "step_00000007.pt cannot be read" in told[0]


def test_a_checkpoint_that_does_not_fit_is_one_sentence():
    """Tensors of other names and shapes, and a damaged state of the optimizer and the scaler."""
    good = make_state(precision="fp16").state_dict()
    weights = good["model"]
    first = next(iter(weights))
    wrong_shape = {**weights, first: torch.zeros(1)}
    one_more = {**weights, "more": torch.zeros(1)}
    one_less = dict(weights)
    del one_less[first]
    momentum = good["optimizer"]["state"][0]

    def optimizer_with(buffers):
        return {"optimizer": {"state": buffers}}

    cases = {
        f"{first} .1. instead of": {"model": wrong_shape},
        f"missing: {first}": {"model": one_less},
        "unknown: more": {"model": one_more},
        "parameter 99": optimizer_with({99: {}}),
        "parameter 'a'": optimizer_with({"a": {}}),
        "parameter 0": optimizer_with({0: {"momentum_buffer": torch.zeros(7)}}),
        "parameter 1": optimizer_with({0: momentum, 1: {}}),
        "GradScaler": {"scaler": {"scale": 1.0}},
    }
    for words, change in cases.items():
        state = make_state(precision="fp16")
        with pytest.raises(ValueError, match=words):
            state.load_state_dict({**good, **change})
