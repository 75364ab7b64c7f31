"""What a user gets wrong ends with one sentence, on every rank, and loses nothing. The whole
application, two ranks.
"""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from checkpoint_utils import name_of_newest
from dist_utils import (
    TIMEOUT_SECONDS,
    TINY_NETWORK,
    logged_lines,
    options,
    run_app,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
)
from PIL import Image

from resnet_dist import cli, engine
from resnet_dist.checkpoints import checkpoint
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.data.sampling.order import rows_at

SMALL = small_run(
    model__name=TINY_NETWORK,
    train__epochs=1,
    schedule__warmup_epochs=0.5,
)


@pytest.fixture
def data(digits, tmp_path):
    """A copy of the digits to spoil, read as any folder."""
    return shutil.copytree(digits, tmp_path / "data")


def words_of_training(tmp_path, *more):
    """The command line of a short training, which writes to `tmp_path / "run"`."""
    own = options(
        config="configs/quickstart.yaml",
        output_dir=tmp_path / "run",
    )
    return ["train", *own, *SMALL, *more]


def train(tmp_path, *more, world_size=2, entry=None):
    """Exit codes and everything that was printed."""
    output = tmp_path / "printed"
    output.unlink(missing_ok=True)
    words = words_of_training(tmp_path, "--data.kind", "folder", *more)
    codes = run_app(world_size, words, str(output), entry)
    return codes, output.read_text()


def train_on(data_dir, tmp_path, *more, entry=None):
    """As `train`, with the data of a folder."""
    return train(tmp_path, "--data.data_dir", str(data_dir), *more, entry=entry)


def count_trained_steps(run_folder):
    """How many steps metrics.jsonl has a loss of."""
    return len([line for line in logged_lines(run_folder) if "train/loss" in line])


def is_checkpoint_being_written(path):
    """Whether a file is a checkpoint on its way, of a step other than 5."""
    name = str(path)
    is_temporary = ".pt." in name and name.endswith(".tmp")
    return is_temporary and "step_00000005" not in name


def wait_for_file(path):
    """Until the file exists."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_refused(result, *words):
    """Every rank ends with code 2; one of them says why, once, without a traceback."""
    codes, printed = result
    assert codes == [2] * len(codes), printed
    assert printed.count("error") == 1, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed, printed


def test_data_that_is_missing_empty_or_flat(tmp_path, data):
    assert_refused(train_on("", tmp_path), "data.data_dir")
    assert_refused(train_on(tmp_path / "nowhere", tmp_path), "data.data_dir", "nowhere")

    # All validation images in one folder.
    val = data / "val"
    for path in val.glob("*/*.jpg"):
        label = path.parent.name
        path.rename(val / f"{label}_{path.name}")
    for path in val.glob("[0-9]"):
        path.rmdir()
    assert_refused(train_on(data, tmp_path), "val/ is flat")

    shutil.rmtree(val)
    assert_refused(train_on(data, tmp_path), "no folder val/")
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    assert_refused(train_on(data, tmp_path), "train/ is empty")


def test_classes_that_disagree(tmp_path, data):
    result = train_on(data, tmp_path, "--model.num_classes", "1000")
    assert_refused(result, "model.num_classes is 1000", "10")
    shutil.rmtree(data / "val" / "7")
    assert_refused(train_on(data, tmp_path), "classes", "only in train/ (7)")


def test_layouts_and_names(tmp_path, digits):
    result = train_on(digits, tmp_path, "--train.global_batch_size", "121")
    assert_refused(result, "121", "2 ranks", "120 or 122")
    result = train_on(digits, tmp_path, "--train.global_batch_size", "2000")
    assert_refused(result, "1442", "2000")
    result = train_on(digits, tmp_path, "--model.name", "resnet21")
    assert_refused(result, "resnet21", "resnet20")
    codes, printed = train(tmp_path, "--model.nmae", "x")
    assert codes == [2, 2]
    assert printed.count("--model.nmae") == 1


def spoil(files):
    """Damage three of the files, and give a fourth one four channels. Returns the three paths."""
    cut_off, empty, no_image, four_channels = (files[row] for row in (0, 40, 80, 120))
    cut_off.write_bytes(cut_off.read_bytes()[:300])
    empty.write_bytes(b"")
    no_image.write_text("<html>404 not found</html>")
    with Image.open(four_channels) as image:
        converted = image.convert("CMYK")
    converted.save(four_channels, format="JPEG")
    return {str(path) for path in (cut_off, empty, no_image)}


def test_broken_images_cost_neither_the_run_nor_the_count(tmp_path, data):
    """Truncated, empty, text in disguise, CMYK: training goes on with neighbours, evaluation counts
    all 355.
    """
    run_folder = tmp_path / "run"
    bad_train = spoil(sorted((data / "train").glob("*/*.jpg")))
    bad_val = spoil(sorted((data / "val").glob("*/*.jpg")))
    codes, printed = train_on(data, tmp_path)
    assert codes == [0, 0], printed
    assert "3 of 355 validation images cannot be decoded" in printed
    assert count_trained_steps(run_folder) == 12

    lines = logged_lines(run_folder)
    evaluation = lines[-1]
    assert evaluation["val/num"] == 355
    assert evaluation["val/bad_images"] == 3
    bad_in_training = [line.get("train/bad_images", 0) for line in lines]
    assert max(bad_in_training) > 0

    quarantined = set()
    for line in (run_folder / "quarantine.jsonl").read_text().splitlines():
        quarantined.add(json.loads(line)["path"])
    # A training file may lie in the tail that is dropped.
    assert bad_val <= quarantined
    assert quarantined <= bad_train | bad_val
    assert quarantined & bad_train


def test_too_many_broken_images_stop_every_rank(tmp_path, data):
    threes = list((data / "train" / "3").glob("*.jpg"))
    for path in threes[:60]:
        path.write_bytes(b"")
    codes, printed = train_on(data, tmp_path, "--data.max_bad_images", "5")
    assert codes == [2, 2], printed
    # Both ranks may have met too many.
    num_errors = printed.count("error (rank")
    assert num_errors in (1, 2)
    assert "Traceback" not in printed
    assert "data.max_bad_images" in printed
    assert "quarantine.jsonl" in printed


def test_a_checkpoint_of_another_model_or_batch(tmp_path, digits):
    run_folder = tmp_path / "run"
    saved_config = run_folder / "config.yaml"
    codes, printed = train_on(digits, tmp_path)
    assert codes == [0, 0], printed

    before = saved_config.read_text()
    result = train_on(digits, tmp_path, "--model.name", "resnet32")
    assert_refused(result, "model.name", TINY_NETWORK, "init_from")
    assert saved_config.read_text() == before
    result = train_on(digits, tmp_path, "--train.global_batch_size", "60")
    assert_refused(result, "train.global_batch_size", "120", "60")

    # The weights alone may be taken.
    last = run_folder / "checkpoints" / "last.pt"
    codes, printed = train_on(
        digits,
        tmp_path,
        *("--output_dir", str(tmp_path / "other")),
        *("--checkpoint.init_from", str(last)),
    )
    assert codes == [0, 0]
    assert "step 0, with the weights of" in printed

    result = train_on(
        digits,
        tmp_path,
        *("--output_dir", str(tmp_path / "third")),
        *("--checkpoint.resume", str(tmp_path / "nowhere.pt")),
    )
    assert_refused(result, "nowhere.pt", "cannot be read")


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, digits):
    saves_often = ("--checkpoint.interval_steps", "5")
    codes, printed = train_on(digits, tmp_path, *saves_often)
    assert codes == [0, 0], printed
    folder = tmp_path / "run" / "checkpoints"
    newest = (folder / "last.pt").resolve()
    newest.write_bytes(newest.read_bytes()[:1000])

    codes, printed = train_on(digits, tmp_path, *saves_often)
    assert codes == [0, 0], printed
    assert "damaged" in printed
    assert "step 10, from" in printed
    assert name_of_newest(folder) == newest.name

    for path in folder.glob("step_*.pt"):
        path.write_bytes(b"")
    result = train_on(digits, tmp_path, *saves_often)
    assert_refused(result, "none of the 3 checkpoints")


def test_the_best_is_saved_whenever_it_is_found(tmp_path, digits):
    codes, printed = train(
        tmp_path,
        *options(
            data__data_dir=digits,
            train__epochs=3,
            optim__base_lr=0.05,
            checkpoint__interval_epochs=0,
            checkpoint__keep=1,
        ),
    )
    assert codes == [0, 0]
    run_folder = tmp_path / "run"
    evaluations = [line for line in logged_lines(run_folder) if "val/top1" in line]
    # Of several equal ones, the first.
    best = max(evaluations, key=lambda line: line["val/top1"])
    best_link = run_folder / "checkpoints" / "best.pt"
    assert os.readlink(best_link) == f"step_{best['step']:08d}.pt"
    assert f"at step {best['step']}" in printed


def test_a_second_signal_does_not_end_the_last_write(tmp_path, digits):
    """The write takes seconds, and the launcher that asked for the end asks again."""
    is_writing = tmp_path / "writing"
    printed = tmp_path / "printed"

    def entry(arguments):
        real_write = checkpoint.write_checkpoint

        def write_slowly(path, content, *checks):
            is_writing.touch()
            time.sleep(1.5)
            real_write(path, content, *checks)

        checkpoint.write_checkpoint = write_slowly
        return cli.main(arguments)

    words = words_of_training(tmp_path, *options(data__data_dir=digits, train__epochs=50))
    processes = start_app(2, words, str(printed), entry)
    wait_for_file(tmp_path / "run" / "metrics.jsonl")
    os.kill(processes[0].pid, signal.SIGUSR1)
    wait_for_file(is_writing)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    codes = wait_app(processes)
    assert codes == [128 + signal.SIGUSR1] * 2, printed.read_text()
    assert newest_valid(tmp_path / "run" / "checkpoints", pytest.fail)


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, the device that is always full"
)
def test_a_full_disk_while_saving(tmp_path, digits):
    """From step 6 on nothing can be saved: training goes on to the end, warns, keeps step 5, and
    does not end well.
    """

    def entry(arguments):
        import builtins

        real_open = builtins.open

        def open_on_full_disk(path, mode="r", *args, **kwargs):
            if is_checkpoint_being_written(path):
                path = "/dev/full"
            return real_open(path, mode, *args, **kwargs)

        builtins.open = open_on_full_disk
        return cli.main(arguments)

    codes, printed = train_on(digits, tmp_path, "--checkpoint.interval_steps", "5", entry=entry)
    assert codes[0] == 2, printed
    assert "warning: could not save the checkpoint of step 10" in printed
    assert "step 5 stays" in printed
    run_folder = tmp_path / "run"
    assert count_trained_steps(run_folder) == 12
    assert name_of_newest(run_folder / "checkpoints") == "step_00000005.pt"


@pytest.mark.parametrize(
    "how", ["read-only", "removed", "removed while it is written", "taken by a file"]
)
def test_a_folder_that_stops_taking_checkpoints(tmp_path, digits, how):
    """After step 5. Each try is warned about with the reason; a folder that is merely gone is made
    again.
    """
    run_folder = tmp_path / "run"
    folder = run_folder / "checkpoints"
    moved = run_folder / "moved"

    def entry(arguments):
        import builtins

        real_open = builtins.open
        real_step = engine.train_step
        real_write = checkpoint.write_checkpoint

        def open_read_only(path, mode="r", *args, **kwargs):
            if is_checkpoint_being_written(path):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real_open(path, mode, *args, **kwargs)

        def remove_and_train_step(model, state, *rest):
            if state.step == 8 and os.environ["RANK"] == "0":
                wait_for_the_save()
                folder.rename(moved)
                if how == "taken by a file":
                    folder.write_text("")
            return real_step(model, state, *rest)

        def write_and_vanish(path, content, before_publishing):
            def vanish():
                before_publishing()
                if content["step"] == 10 and not moved.exists():
                    folder.rename(moved)

            real_write(path, content, vanish)

        if how == "read-only":
            builtins.open = open_read_only
        elif how == "removed while it is written":
            checkpoint.write_checkpoint = write_and_vanish
        else:
            engine.train_step = remove_and_train_step
        return cli.main(arguments)

    codes, printed = train_on(digits, tmp_path, "--checkpoint.interval_steps", "5", entry=entry)
    assert count_trained_steps(run_folder) == 12
    first_folder = folder if how == "read-only" else moved
    assert name_of_newest(first_folder) == "step_00000005.pt"
    if how in ("removed", "removed while it is written"):
        assert codes == [0, 0], printed
        assert "warning: could not" not in printed, printed
        assert sorted(path.name for path in folder.glob("*.pt")) == [
            "best.pt",
            "last.pt",
            "step_00000010.pt",
            "step_00000012.pt",
        ]
        assert name_of_newest(folder) == "step_00000012.pt"
        return

    reason = "Read-only file system" if how == "read-only" else "File exists"
    assert codes[0] == 2, printed
    for step in (10, 12):
        warning = (
            rf"warning: could not save the checkpoint of step {step} to .*{reason}.*step 5 stays"
        )
        assert re.search(warning, printed)
    assert re.search(r"error \(rank 0\): could not save the checkpoint of step 12", printed)


def wait_for_the_save():
    """Until the checkpoint that is being written is there: it may take its time."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_a_second_ctrl_c_leaves_at_once(tmp_path, digits):
    """While a save takes its time. The first one waits for it; the second, more than a second
    later, for nothing.
    """
    is_writing = tmp_path / "writing"
    printed = tmp_path / "printed"
    run_folder = tmp_path / "run"

    def entry(arguments):
        def write_for_ever(path, content, *checks):
            is_writing.touch()
            time.sleep(100)

        checkpoint.write_checkpoint = write_for_ever
        return cli.main(arguments)

    # The save at the signal is the only one.
    more = options(
        data__data_dir=digits,
        train__epochs=50,
        checkpoint__interval_epochs=0,
        train__eval_interval_epochs=0,
    )
    words = words_of_training(tmp_path, *more)
    processes = start_app(2, words, str(printed), entry)
    wait_for_step(run_folder, 2, processes)
    os.kill(processes[0].pid, signal.SIGINT)
    wait_for_file(is_writing)
    time.sleep(1.1)
    os.kill(processes[0].pid, signal.SIGINT)
    codes = wait_app(processes, timeout=80)
    assert codes == [128 + signal.SIGINT] * 2, printed.read_text()
    last = run_folder / "checkpoints" / "last.pt"
    assert not last.exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_steps(tmp_path, digits):
    """The updates after step 4; the file for a replay names their images."""

    def entry(arguments):
        real_step = engine.train_step

        def poisoned(model, state, micro_batches, *rest):
            if state.step >= 4:
                micro_batches[0].images.fill_(torch.nan)
            return real_step(model, state, micro_batches, *rest)

        engine.train_step = poisoned
        return cli.main(arguments)

    result = train_on(digits, tmp_path, "--train.max_nonfinite_steps", "3", entry=entry)
    assert_refused(
        result,
        "the updates 5 to 7",
        "not finite",
        "optim.base_lr",
        "norm nan",
        "nonfinite.json",
    )
    replay = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert replay["steps"] == [4, 5, 6]
    assert len(replay["lr"]) == 3
    assert min(replay["lr"]) > 0

    first_rank, second_rank = replay["rows_of_ranks"]
    for step, first_rows, second_rows in zip(replay["steps"], first_rank, second_rank, strict=True):
        rows = first_rows + second_rows
        positions = np.arange(120 * step, 120 * (step + 1))
        expected = rows_at(0, 0, 1442, positions)
        assert rows == expected.tolist()
        for row in rows:
            assert os.path.isfile(replay["files"][str(row)])


def test_a_batch_of_one_names_the_key(tmp_path, data):
    """A rank that has one image, whose last feature map is one pixel, has one value per channel."""
    size = 4
    result = train(
        tmp_path,
        *options(
            data__data_dir=data,
            data__train_crop_size=size,
            data__val_resize_size=size,
            data__val_crop_size=size,
            model__sync_batch_norm=False,
            train__global_batch_size=2,
        ),
    )
    assert_refused(result, "train.global_batch_size", "make it at least 2")
