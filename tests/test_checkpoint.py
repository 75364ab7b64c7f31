"""The state of a run: saved whole or not at all, and nothing about it is lost in silence."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_utils import make_saver, make_state, save_steps
from dist_utils import equal_trees
from torch import nn

from resnet_dist import files
from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.checkpoints.checkpoint_file import digest_path, read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.resume_rules import flatten
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.config import OptimConfig
from resnet_dist.optim import build_optimizer


def test_everything_comes_back(tmp_path):
    saver, warnings = make_saver(tmp_path)
    state = make_state(precision="fp16")
    state.scaler.scale(state.model(torch.randn(4, 3, 5, 5)).sum()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.ema.update()
    state.step = 7
    state.evaluated_step = 5
    state.best_top1 = 42.0
    state.best_step = 5
    saver.save(state)
    saver.wait()
    assert not warnings
    other = make_state(seed=1, precision="fp16")
    other.load_state_dict(unpack_checkpoint(read_checkpoint(tmp_path / "last.pt"), "last.pt"))
    optimizer_state = flatten(state.state_dict()["optimizer"]["state"])
    other_optimizer_state = flatten(other.state_dict()["optimizer"]["state"])
    assert equal_trees(optimizer_state, other_optimizer_state)
    assert equal_trees(state.model.state_dict(), other.model.state_dict())
    assert equal_trees(state.ema.model.state_dict(), other.ema.model.state_dict())
    assert other.step == 7
    assert other.evaluated_step == 5
    assert other.best_top1 == 42.0
    assert other.best_step == 5
    assert other.scaler.state_dict() == state.scaler.state_dict() != {}


def test_the_snapshot_is_of_the_moment_of_the_call(tmp_path):
    saver, _ = make_saver(tmp_path)
    state = make_state()
    before = next(state.model.parameters()).detach().clone()
    saver.save(state)
    with torch.no_grad():
        next(state.model.parameters()).zero_()
    saver.wait()
    saved = unpack_checkpoint(read_checkpoint(tmp_path / "step_00000000.pt"), "")
    assert torch.equal(next(iter(saved["model"].values())), before)


def test_keeps_the_newest_and_the_best_and_links_them(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, best=(3,))
    names = sorted(path.name for path in tmp_path.glob("step_*.pt"))
    assert names == ["step_00000003.pt", "step_00000006.pt", "step_00000007.pt"]
    assert os.readlink(tmp_path / "best.pt") == "step_00000003.pt"
    assert unpack_checkpoint(read_checkpoint(tmp_path / "last.pt"), "")["step"] == 7

    digests = [path.name for path in tmp_path.glob("*.sha256")]
    assert len(digests) == 3
    command = ["sha256sum", "--check", "--quiet", *digests]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_the_optimizers_settings_are_the_present_ones():
    """Of the file come the momentum buffers; learning rate, decay and momentum are the config's
    that is run.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 2)

    def state_with(config):
        optimizer = build_optimizer(config, model)
        return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))

    saved = state_with(OptimConfig(momentum=0.9, weight_decay=1e-4))
    saved.optimizer.state[model.weight]["momentum_buffer"].fill_(7.0)
    with_momentum = saved.state_dict()
    without_momentum = saved.state_dict()
    without_momentum["optimizer"]["state"] = {}
    for content, expected in ((with_momentum, 7.0), (without_momentum, 0.0)):
        state = state_with(OptimConfig(momentum=0.8, weight_decay=5e-4))
        state.load_state_dict(content)
        group = state.optimizer.param_groups[0]
        assert group["weight_decay"] == 5e-4
        assert group["momentum"] == 0.8
        buffer = state.optimizer.state[model.weight]["momentum_buffer"]
        assert buffer.unique().tolist() == [expected]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full"
)
def test_a_full_disk_is_a_warning_and_the_old_file_stays(tmp_path, monkeypatch):
    saver, warnings = save_steps(tmp_path, (1,))
    real_open = open

    def open_on_full_disk(path, *args, **options):
        if ".pt." in str(path) and str(path).endswith(".tmp"):
            path = "/dev/full"
        return real_open(path, *args, **options)

    monkeypatch.setattr("builtins.open", open_on_full_disk)
    state = make_state()
    state.step = 2
    saver.save(state)
    saver.wait()
    assert len(warnings) == 1
    assert "step 2" in warnings[0]
    assert "step 1 stays" in warnings[0]
    assert "No space left on device" in warnings[0]
    assert saver.failure
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"
    monkeypatch.undo()
    state.step = 3
    saver.save(state)
    saver.wait()
    assert not saver.failure
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000003.pt"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    saver, warnings = save_steps(tmp_path, (1,))
    state = make_state()
    state.step = 2
    with torch.no_grad():
        next(state.model.parameters())[0] = float("nan")
    saver.save(state)
    saver.wait()
    assert "not finite" in warnings[0]
    assert not (tmp_path / "step_00000002.pt").exists()


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    saver, warnings = save_steps(folder, (1,))
    subprocess.run(["rm", "-r", str(folder)], check=True)
    state = make_state()
    state.step = 2
    saver.save(state)
    saver.wait()
    assert not warnings
    assert newest_valid(folder, pytest.fail)


@pytest.mark.parametrize("newer_attempt", [False, True])
@pytest.mark.parametrize("rename", [1, 2])
def test_a_folder_that_vanishes_while_it_is_written_is_made_again(
    tmp_path, monkeypatch, rename, newer_attempt
):
    """Before each of the renames, of the file and of its digest.

    The folder of a newer attempt in its place stays as it is, and a file that is complete counts.
    """
    folder = tmp_path / "checkpoints"
    real = os.replace
    calls = []
    saver, warnings = save_steps(folder, (1,))
    saver.claim()
    other, _ = make_saver(folder)

    def replace(source, target):
        calls.append(target)
        if len(calls) == rename:
            folder.rename(tmp_path / "moved")
            if newer_attempt:
                other.claim()
        real(source, target)

    state = make_state()
    state.step = 2
    monkeypatch.setattr(os, "replace", replace)
    saver.save(state)
    saver.wait()
    newest = newest_valid(tmp_path / "moved", pytest.fail)
    if rename == 2:
        assert newest.name == "step_00000002.pt"
    if newer_attempt:
        assert os.listdir(folder) == ["attempt"]
    if newer_attempt and rename == 1:
        assert "newer attempt" in warnings[0]
    elif rename == 1:
        assert not warnings
        assert newest_valid(folder, pytest.fail).name == "step_00000002.pt"


@pytest.mark.parametrize("way", ["real", "simulated"])
def test_a_disk_with_room_for_two_keeps_the_newest(tmp_path, monkeypatch, way):
    """`keep` asks for three and two fit: each save frees the oldest, and none fails.

    On a real file system of that size where one can be mounted, and on a simulated one.
    """
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_steps(folder, (1,))
    size = (folder / "step_00000001.pt").stat().st_size
    (folder / "step_00000001.pt").unlink()
    pages = -(-size // 4096)
    # Two with their digests, the file `saved`, and one page less than a third needs.
    mounted = way == "real" and mount_small_disk(folder, 4096 * (2 * (pages + 1) + pages))
    if not mounted:
        limit_the_disk(monkeypatch, folder, 2 * size + size // 2)
    try:
        saver, warnings = save_steps(folder, range(1, 7), keep=3)
        assert warnings == []
        assert saver.failure is None
        assert steps_in(folder) == [5, 6]
        assert newest_valid(folder, pytest.fail).name == "step_00000006.pt"
        saver, warnings = save_steps(folder, range(7, 10), keep=3, best=range(7, 10))
        assert warnings == []
        assert steps_in(folder) == [8, 9]
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_the_best_one_is_never_removed_for_a_new_one(tmp_path, monkeypatch):
    """Room for three, of which one is the best."""
    save_steps(tmp_path, (1, 2), best=(1,))
    size = (tmp_path / "step_00000002.pt").stat().st_size
    limit_the_disk(monkeypatch, tmp_path, 3 * size + size // 2)
    saver, warnings = make_saver(tmp_path)
    state = resumed(tmp_path)
    saver.note_saved(state)
    for state.step in range(3, 7):
        saver.save(state)
        saver.wait()
        assert not warnings
        assert steps_in(tmp_path) == [1, state.step - 1, state.step]


@pytest.mark.parametrize("best", [-1, 1])
def test_the_last_good_one_is_never_removed_for_a_new_one(tmp_path, monkeypatch, best):
    """Room for one, or for two of which one is the best: the save fails, and all stay."""
    saver, _ = save_steps(tmp_path, (1, 2) if best > 0 else (2,), best=(best,))
    before = steps_in(tmp_path)
    size = (tmp_path / "step_00000002.pt").stat().st_size
    limit_the_disk(monkeypatch, tmp_path, len(before) * size + size // 2)
    state = make_state()
    state.step = 3
    state.best_step = best
    saver.save(state)
    saver.wait()
    assert "No space left" in saver.failure
    assert "step 2 stays" in saver.failure
    assert steps_in(tmp_path) == before
    for path in tmp_path.glob("step_*.pt"):
        read_checkpoint(path)


def steps_in(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt"))


def mount_small_disk(folder, size):
    """Whether a file system of so many bytes could be mounted on the folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def limit_the_disk(monkeypatch, folder, size):
    """Let writes fail once the checkpoints in the folder take more bytes than that."""
    real = os.fsync

    def fsync(descriptor):
        used = sum(path.stat().st_size for path in folder.glob("step_*.pt*"))
        if used > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.slow
def test_links_are_mended_at_every_start_and_save(tmp_path):
    """After a kill between writing the file and moving the links, and after any damage to them."""
    save_steps(tmp_path, (1, 2, 3), best=(2,))
    for damage in ("old", "gone", "circle", "a file", "no digest", "stale digest"):
        for name, old in (("last.pt", "step_00000001.pt"), ("best.pt", "step_00000003.pt")):
            link = tmp_path / name
            link.unlink()
            if damage == "old":
                link.symlink_to(old)
            elif damage == "circle":
                link.symlink_to(name)
            elif damage == "a file":
                link.write_bytes(b"")
            elif damage != "gone":
                link.symlink_to(old)
        if damage == "no digest":
            digest_path(tmp_path / "step_00000003.pt").unlink()
        elif damage == "stale digest":
            digest_path(tmp_path / "step_00000003.pt").write_text(f"{'0' * 64}  step_00000003.pt")
        saver, warnings = make_saver(tmp_path)
        saver.note_saved(resumed(tmp_path))
        saver.claim()
        assert os.readlink(tmp_path / "last.pt") == "step_00000003.pt", damage
        assert os.readlink(tmp_path / "best.pt") == "step_00000002.pt", damage
        assert sha256sum_is_content(tmp_path), damage
        assert not warnings, damage
    (tmp_path / "last.pt").unlink()
    (tmp_path / "best.pt").unlink()
    state = resumed(tmp_path)
    state.step = 4
    saver.save(state)
    saver.wait()
    assert os.readlink(tmp_path / "last.pt") == "step_00000004.pt"
    assert os.readlink(tmp_path / "best.pt") == "step_00000002.pt"


def test_a_best_link_that_leads_nowhere_is_removed(tmp_path):
    save_steps(tmp_path, (1, 2), best=(1,))
    (tmp_path / "step_00000001.pt").unlink()
    saver, _ = make_saver(tmp_path)
    saver.note_saved(resumed(tmp_path))
    saver.claim()
    assert not (tmp_path / "best.pt").is_symlink()
    assert os.readlink(tmp_path / "last.pt") == "step_00000002.pt"


def resumed(folder):
    state = make_state()
    payload = read_checkpoint(newest_valid(folder, pytest.fail))
    state.load_state_dict(unpack_checkpoint(payload, "newest"))
    return state


def sha256sum_is_content(folder):
    names = [path.name for path in folder.glob("*.sha256")]
    command = ["sha256sum", "--check", "--quiet", *names]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def test_what_lies_in_the_folder_fails_no_save(tmp_path):
    """Folders under names of temporary files, of links and of the digest; links in a circle."""
    save_steps(tmp_path, (1,))
    for name in ("x.tmp", "step_00000009.pt.tmp", "step_00000002.pt.sha256"):
        (tmp_path / name).mkdir()
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000007.pt").symlink_to("step_00000007.pt")
    saver, warnings = save_steps(tmp_path, (2, 3), best=(3,))
    assert not warnings
    assert saver.failure is None
    assert read_checkpoint(tmp_path / "step_00000003.pt")
    told = []
    assert newest_valid(tmp_path, told.append).name == "step_00000003.pt"
    assert len(told) == 1
    assert "step_00000007.pt cannot be read" in told[0]


def test_a_checkpoint_that_does_not_fit_is_one_sentence():
    """Tensors of other names and shapes, damaged state of optimizer and scaler."""
    good = make_state(precision="fp16").state_dict()
    first = next(iter(good["model"]))
    wrong_shape = {**good["model"], first: torch.zeros(1)}
    without = {key: value for key, value in good["model"].items() if key != first}
    momentum = good["optimizer"]["state"][0]["momentum_buffer"]
    cases = {
        f"{first} .1. instead of": {"model": wrong_shape},
        f"missing: {first}": {"model": without},
        "unknown: more": {"model": {**good["model"], "more": torch.zeros(1)}},
        "parameter 99": {"optimizer": {"state": {99: {}}}},
        "parameter 'a'": {"optimizer": {"state": {"a": {}}}},
        "parameter 0": {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(7)}}}},
        "parameter 1": {"optimizer": {"state": {0: {"momentum_buffer": momentum}, 1: {}}}},
        "GradScaler": {"scaler": {"scale": 1.0}},
    }
    for words, change in cases.items():
        with pytest.raises(ValueError, match=words):
            make_state(precision="fp16").load_state_dict({**good, **change})
