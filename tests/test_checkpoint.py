"""Checkpoints: whole or not there, verified, newest valid first."""

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_dist import checkpoint
from resnet_dist.checkpoint import (
    Saver,
    TrainState,
    newest_valid,
    read_checkpoint,
    unpack_checkpoint,
)
from resnet_dist.config import Config, ModelConfig, OptimConfig, to_dict
from resnet_dist.ema import Ema
from resnet_dist.optim import build_optimizer

FACTS = {
    "config": to_dict(Config()),
    "num_samples": 100,
    "fingerprint": "f",
    "class_names": ["a", "b"],
}


def make_state(seed=0, precision="fp32"):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 5, 5))
    return TrainState(
        model,
        build_optimizer(OptimConfig(), model),
        torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        Ema(model, 0.9),
    )


def make_saver(folder, keep=3):
    warnings = []
    return Saver(Path(folder), keep, FACTS, warnings.append, is_main=True), warnings


def save_steps(folder, steps, keep=3, best=()):
    saver, warnings = make_saver(folder, keep)
    state = make_state()
    for step in steps:
        state.step = step
        if step in best:
            state.best_step = step
        with torch.no_grad():
            next(state.model.parameters()).fill_(float(step))
        saver.save(state)
    saver.wait()
    return saver, warnings


def test_everything_comes_back(tmp_path):
    saver, warnings = make_saver(tmp_path)
    state = make_state(precision="fp16")
    state.scaler.scale(state.model(torch.randn(4, 3, 5, 5)).sum()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.ema.update()
    state.step, state.evaluated_step, state.best_top1, state.best_step = 7, 5, 42.0, 5
    saver.save(state)
    saver.wait()
    assert not warnings
    other = make_state(seed=1, precision="fp16")
    other.load_state_dict(unpack_checkpoint(read_checkpoint(tmp_path / "last.pt"), "last.pt"))
    flat = [checkpoint.flatten(s.state_dict()["optimizer"]["state"]) for s in (state, other)]
    assert flat[0].keys() == flat[1].keys() and all(
        torch.equal(flat[0][k], flat[1][k]) for k in flat[0]
    )
    for a, b in ((state.model, other.model), (state.ema.model, other.ema.model)):
        assert all(
            torch.equal(x, y)
            for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )
    assert (other.step, other.evaluated_step, other.best_top1, other.best_step) == (7, 5, 42.0, 5)
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
    assert sorted(p.name for p in tmp_path.glob("step_*.pt")) == [
        f"step_{n:08d}.pt" for n in (3, 6, 7)
    ]
    assert len(list(tmp_path.glob("*.sha256"))) == 3
    assert os.readlink(tmp_path / "best.pt") == "step_00000003.pt"
    assert unpack_checkpoint(read_checkpoint(tmp_path / "last.pt"), "")["step"] == 7
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--quiet", *(p.name for p in tmp_path.glob("*.sha256"))],
            cwd=tmp_path,
            capture_output=True,
        ).returncode
        == 0
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no digest"])
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
        (tmp_path / "step_00000002.pt.sha256").unlink()
    path.write_bytes(content)
    warnings = []
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "step_00000001.pt"
    assert (
        len(warnings) == 1 and "step_00000002.pt" in warnings[0] and "the one before" in warnings[0]
    )


def test_nothing_valid_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert newest_valid(tmp_path, pytest.fail) is None
    assert newest_valid(tmp_path / "absent", pytest.fail) is None
    save_steps(tmp_path, (1,))
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, lambda text: None)


def test_a_bit_flipped_anywhere_is_found(tmp_path):
    """In every part of the file and of its digest: headers, tensors, padding, the archive's list,
    the last byte.
    """
    save_steps(tmp_path, (1, 2))
    path, digest = tmp_path / "step_00000002.pt", tmp_path / "step_00000002.pt.sha256"
    whole, digits = path.read_bytes(), digest.read_bytes()
    places = sorted({0, 1, len(whole) - 1, *range(0, len(whole), len(whole) // 150)})
    for place in places:
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)
        path.write_bytes(whole[:place])  # and cut off there
        with pytest.raises(ValueError, match="damaged" if place else "empty"):
            read_checkpoint(path)
    path.write_bytes(whole)
    for place in range(64):
        digest.write_bytes(
            digits[:place] + bytes([digits[place] ^ 1 << place % 8]) + digits[place + 1 :]
        )
        with pytest.raises(ValueError, match="damaged|cannot be read"):
            read_checkpoint(path)
    digest.write_bytes(digits)
    assert newest_valid(tmp_path, pytest.fail) == path


def test_a_newer_format_is_not_loaded_and_the_one_before_is(tmp_path, monkeypatch):
    save_steps(tmp_path, (1,))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_steps(tmp_path, (2,))
    monkeypatch.undo()
    warnings = []
    assert newest_valid(tmp_path, warnings.append).name == "step_00000001.pt"
    assert (
        "has format 2, this version reads up to 1" in warnings[0]
        and "the one before" in warnings[0]
    )


def test_a_folder_of_set_aside_ones_is_no_start_from_scratch(tmp_path):
    save_steps(tmp_path, (1, 2))
    (tmp_path / "step_00000002.pt").write_bytes(b"damaged")
    newest_valid(tmp_path, lambda text: None)
    (tmp_path / "step_00000001.pt").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path, lambda text: None)


def test_damaged_ones_are_set_aside_and_never_crowd_out_the_good(tmp_path):
    """After a fallback to step 1 the damaged step 9 does not count among the newest that are kept."""
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


def test_saving_over_a_damaged_file_does_not_bless_it(tmp_path, monkeypatch):
    """A kill between the new digest and the rename leaves the damaged file with digests that are
    not its own.
    """
    save_steps(tmp_path, (1, 2))
    (tmp_path / "step_00000002.pt").write_bytes(b"damaged")
    real = os.replace

    def replace(source, target):
        if str(target).endswith(".pt"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_checkpoint(
            tmp_path / "step_00000002.pt", {"format": 1, "model": {}, "step": 2}
        )
    assert newest_valid(tmp_path, lambda text: None).name == "step_00000001.pt"


def test_the_optimizers_settings_are_the_present_ones():
    """Of the file come the momentum buffers; learning rate, decay and momentum are the config's
    that is run.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    plain, ours = (OptimConfig(momentum=m, weight_decay=w) for m, w in ((0.9, 1e-4), (0.8, 5e-4)))
    saved = TrainState(
        model, build_optimizer(plain, model), torch.amp.GradScaler("cpu", enabled=False)
    )
    saved.optimizer.state[model.weight]["momentum_buffer"].fill_(7.0)
    for momentum_before in (True, False):
        content = saved.state_dict()
        if not momentum_before:
            content["optimizer"]["state"] = {}
        state = TrainState(
            model, build_optimizer(ours, model), torch.amp.GradScaler("cpu", enabled=False)
        )
        state.load_state_dict(content)
        group = state.optimizer.param_groups[0]
        assert (group["weight_decay"], group["momentum"]) == (5e-4, 0.8)
        buffer = state.optimizer.state[model.weight]["momentum_buffer"]
        assert buffer.unique().tolist() == ([7.0] if momentum_before else [0.0])


def test_half_written_files_do_not_count(tmp_path):
    save_steps(tmp_path, (1,))
    (tmp_path / "step_00000002.pt.tmp").write_bytes(b"PK half")
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"
    save_steps(tmp_path, (3,))  # the next save that succeeds sweeps them up
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("stop_after", ["first digest", "rename"])
def test_a_kill_between_the_renames_leaves_a_valid_file(tmp_path, monkeypatch, stop_after):
    """Saving a step again replaces file and digest one after the other; at every moment the pair is
    valid.
    """
    save_steps(tmp_path, (1,))
    real, calls = os.replace, []

    def replace(source, target):
        if len(calls) == {"first digest": 1, "rename": 2}[stop_after]:
            raise KeyboardInterrupt  # stands for the kill: nothing after it runs
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_checkpoint(
            tmp_path / "step_00000001.pt", {"format": 1, "model": {}, "step": 1}
        )
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full"
)
def test_a_full_disk_is_a_warning_and_the_old_file_stays(tmp_path, monkeypatch):
    saver, warnings = save_steps(tmp_path, (1,))
    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r", *a, _open=open, **k: _open(
            "/dev/full" if str(path).endswith(".pt.tmp") else path, mode, *a, **k
        ),
    )
    state = make_state()
    state.step = 2
    saver.save(state)
    saver.wait()
    assert len(warnings) == 1
    assert (
        "step 2" in warnings[0]
        and "step 1 stays" in warnings[0]
        and "No space left on device" in warnings[0]
    )
    assert saver.failure
    assert newest_valid(tmp_path, pytest.fail).name == "step_00000001.pt"
    monkeypatch.undo()
    state.step = 3
    saver.save(state)
    saver.wait()
    assert not saver.failure and newest_valid(tmp_path, pytest.fail).name == "step_00000003.pt"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    saver, warnings = save_steps(tmp_path, (1,))
    state = make_state()
    state.step = 2
    with torch.no_grad():
        next(state.model.parameters())[0] = float("nan")
    saver.save(state)
    saver.wait()
    assert "not finite" in warnings[0] and not (tmp_path / "step_00000002.pt").exists()


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    saver, warnings = save_steps(folder, (1,))
    subprocess.run(["rm", "-r", str(folder)], check=True)
    state = make_state()
    state.step = 2
    saver.save(state)
    saver.wait()
    assert not warnings and newest_valid(folder, pytest.fail)


@pytest.mark.parametrize("newer_attempt", [False, True])
@pytest.mark.parametrize("rename", [1, 2, 3])
def test_a_folder_that_vanishes_while_it_is_written_is_made_again(
    tmp_path, monkeypatch, rename, newer_attempt
):
    """Before each of the renames: digest, file, digest. A newer attempt's folder in its place stays
    as it is.
    """
    folder, real, calls = tmp_path / "checkpoints", os.replace, []
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
    assert newest_valid(tmp_path / "moved", pytest.fail)
    if newer_attempt:
        assert "newer attempt" in warnings[0] and os.listdir(folder) == ["attempt"]
    else:
        assert not warnings and newest_valid(folder, pytest.fail).name == "step_00000002.pt"


def test_weights_of_another_network_with_the_same_tensors_are_noticed():
    """plain20 and resnet20, strides of v1 and v1.5: every name and shape is the same."""

    def config(**options):
        return Config(model=ModelConfig(**options))

    saved = {"config": to_dict(config(name="plain20", num_classes=10, zero_init_residual=True))}
    assert checkpoint.model_changes(saved, config(name="plain20", num_classes=2)) == []
    assert checkpoint.model_changes(saved, config(name="resnet20")) == [
        "model.name was 'plain20', now 'resnet20'"
    ]
    changes = checkpoint.model_changes(
        saved, config(name="plain20", stride_in_1x1=True, blur_pool=True)
    )
    assert [change.split()[0] for change in changes] == ["model.stride_in_1x1", "model.blur_pool"]
    del saved["config"]["model"]["blur_pool"]  # of a version that did not know it
    assert checkpoint.model_changes(saved, config(name="plain20")) == []
    assert checkpoint.model_changes({"state_dict": {}}, config()) == []


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


def test_what_may_change_between_attempts():
    def facts(**changes):
        config = to_dict(Config())
        for key, value in changes.items():
            section, name = key.split("__")
            config[section][name] = value
        return {"config": config, "num_samples": 100, "fingerprint": "f"}

    saved = {**facts(), "step": 5}
    assert checkpoint.check_resumable(saved, facts(data__threads=7, log__interval_steps=1)) == []
    changed = checkpoint.check_resumable(saved, facts(optim__base_lr=0.2))
    assert len(changed) == 1 and "optim.base_lr" in changed[0]
    with pytest.raises(ValueError, match=r"another model: model\.name"):
        checkpoint.check_resumable(saved, facts(model__name="resnet18"))
    with pytest.raises(
        ValueError, match="another optimizer: optim.kind was 'sgd', now 'lars'; take another"
    ):
        checkpoint.check_resumable(saved, facts(optim__kind="lars"))
    older = copy.deepcopy(saved)
    del (
        older["config"]["optim"]["kind"],
        older["config"]["recipe"],
    )  # of before these keys: it had the defaults
    assert checkpoint.check_resumable(older, facts(recipe__world_size=8)) == []
    with pytest.raises(ValueError, match=r"train\.global_batch_size was 256, now 512"):
        checkpoint.check_resumable(saved, facts(train__global_batch_size=512))
    with pytest.raises(ValueError, match=r"data\.num_samples was 100, now 101"):
        checkpoint.check_resumable(saved, {**facts(), "num_samples": 101})
    for key, value in (
        ("optim__unfreeze_from", "head"),
        ("optim__backbone_lr_scale", 0.1),
    ):  # other buffers
        with pytest.raises(ValueError, match=key.replace("__", r"\.")):
            checkpoint.check_resumable(saved, facts(**{key: value}))
    del saved["config"]["optim"]["unfreeze_from"]  # of a version that did not know it
    assert checkpoint.check_resumable(saved, facts()) == []
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        checkpoint.check_resumable(saved, {**facts(), "fingerprint": "g"})


def test_a_folder_that_is_gone_is_no_new_run(tmp_path):
    """An old run's metrics without its checkpoint folder are an error; a run killed before its
    first save is none.
    """
    folder = tmp_path / "checkpoints"
    checkpoint.refuse_lost(folder)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="checkpoints/ is gone.*output_dir"):
        checkpoint.refuse_lost(folder)
    folder.mkdir()
    (folder / "attempt").write_text("1 x")
    checkpoint.refuse_lost(folder)
