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
from dist_utils import TINY_NETWORK, options, run_app, small_run, start_app, wait_app, wait_for_step
from PIL import Image

from resnet_dist import cli, engine
from resnet_dist.checkpoints import checkpoint
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.data.sampling.order import rows_at

SMALL = small_run(model__name=TINY_NETWORK, train__epochs=1, schedule__warmup_epochs=0.5)


@pytest.fixture
def data(digits, tmp_path):
    """A copy of the digits to spoil, read as any folder."""
    return shutil.copytree(digits, tmp_path / "data")


def train(tmp_path, *more, world_size=2, entry=None):
    """Exit codes and everything that was printed."""
    output = tmp_path / "printed"
    output.unlink(missing_ok=True)
    codes = run_app(
        world_size,
        [
            "train",
            *options(
                config="configs/quickstart.yaml", data__kind="folder", output_dir=tmp_path / "run"
            ),
            *SMALL,
            *more,
        ],
        str(output),
        entry,
    )
    return codes, output.read_text()


def assert_refused(result, *words):
    """Every rank ends with code 2; one of them says why, once, without a traceback."""
    codes, printed = result
    assert codes == [2] * len(codes), printed
    assert printed.count("error") == 1, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed, printed


def test_data_that_is_missing_empty_or_flat(tmp_path, data):
    assert_refused(train(tmp_path, "--data.data_dir", ""), "data.data_dir")
    assert_refused(
        train(tmp_path, "--data.data_dir", str(tmp_path / "nowhere")), "data.data_dir", "nowhere"
    )
    for path in (data / "val").glob("*/*.jpg"):
        path.rename(data / "val" / f"{path.parent.name}_{path.name}")
    for path in (data / "val").glob("[0-9]"):
        path.rmdir()
    assert_refused(train(tmp_path, "--data.data_dir", str(data)), "val/ is flat")
    shutil.rmtree(data / "val")
    assert_refused(train(tmp_path, "--data.data_dir", str(data)), "no folder val/")
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    assert_refused(train(tmp_path, "--data.data_dir", str(data)), "train/ is empty")


def test_classes_that_disagree(tmp_path, data):
    assert_refused(
        train(tmp_path, "--data.data_dir", str(data), "--model.num_classes", "1000"),
        "model.num_classes is 1000",
        "10",
    )
    shutil.rmtree(data / "val" / "7")
    assert_refused(train(tmp_path, "--data.data_dir", str(data)), "classes", "only in train/ (7)")


def test_layouts_and_names(tmp_path, digits):
    assert_refused(
        train(tmp_path, "--data.data_dir", str(digits), "--train.global_batch_size", "121"),
        "121",
        "2 ranks",
        "120 or 122",
    )
    assert_refused(
        train(tmp_path, "--data.data_dir", str(digits), "--train.global_batch_size", "2000"),
        "1442",
        "2000",
    )
    assert_refused(
        train(tmp_path, "--data.data_dir", str(digits), "--model.name", "resnet21"),
        "resnet21",
        "resnet20",
    )
    codes, printed = train(tmp_path, "--model.nmae", "x")
    assert codes == [2, 2]
    assert printed.count("--model.nmae") == 1


def test_broken_images_cost_neither_the_run_nor_the_count(tmp_path, data):
    """Truncated, empty, text in disguise, CMYK: training goes on with neighbours, evaluation counts
    all 355.
    """
    train_files, val_files = (sorted((data / split).glob("*/*.jpg")) for split in ("train", "val"))
    for files in (train_files, val_files):
        files[0].write_bytes(files[0].read_bytes()[:300])
        files[40].write_bytes(b"")
        files[80].write_text("<html>404 not found</html>")
        Image.open(files[120]).convert("CMYK").save(files[120], format="JPEG")
    codes, printed = train(tmp_path, "--data.data_dir", str(data))
    assert codes == [0, 0], printed
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["val/num"] == 355
    assert sum("train/loss" in line for line in lines) == 12
    assert lines[-1]["val/bad_images"] == 3
    assert max(line.get("train/bad_images", 0) for line in lines) > 0
    assert "3 of 355 validation images cannot be decoded" in printed
    quarantined = {
        json.loads(line)["path"]
        for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    }
    bad = [{str(files[i]) for i in (0, 40, 80)} for files in (train_files, val_files)]
    # a training file may lie in the tail that is dropped
    assert bad[1] <= quarantined <= bad[0] | bad[1]
    assert quarantined & bad[0]


def test_too_many_broken_images_stop_every_rank(tmp_path, data):
    for path in list((data / "train" / "3").glob("*.jpg"))[:60]:
        path.write_bytes(b"")
    codes, printed = train(tmp_path, "--data.data_dir", str(data), "--data.max_bad_images", "5")
    assert codes == [2, 2], printed
    # both may have met too many
    assert 1 <= printed.count("error (rank") <= 2 and "Traceback" not in printed
    assert "data.max_bad_images" in printed and "quarantine.jsonl" in printed


def test_a_checkpoint_of_another_model_or_batch(tmp_path, digits):
    arguments = ("--data.data_dir", str(digits))
    assert train(tmp_path, *arguments)[0] == [0, 0]
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert_refused(
        train(tmp_path, *arguments, "--model.name", "resnet32"),
        "model.name",
        TINY_NETWORK,
        "init_from",
    )
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert_refused(
        train(tmp_path, *arguments, "--train.global_batch_size", "60"),
        "train.global_batch_size",
        "120",
        "60",
    )
    last = str(tmp_path / "run" / "checkpoints" / "last.pt")
    codes, printed = train(
        tmp_path,
        *arguments,
        "--output_dir",
        str(tmp_path / "other"),
        "--checkpoint.init_from",
        last,
    )
    assert codes == [0, 0]
    assert "step 0, with the weights of" in printed
    assert_refused(
        train(
            tmp_path,
            *arguments,
            "--output_dir",
            str(tmp_path / "third"),
            "--checkpoint.resume",
            str(tmp_path / "nowhere.pt"),
        ),
        "nowhere.pt",
        "cannot be read",
    )


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, digits):
    arguments = ("--data.data_dir", str(digits), "--checkpoint.interval_steps", "5")
    assert train(tmp_path, *arguments)[0] == [0, 0]
    folder = tmp_path / "run" / "checkpoints"
    newest = folder / os.readlink(folder / "last.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    codes, printed = train(tmp_path, *arguments)
    assert codes == [0, 0], printed
    assert "damaged" in printed
    assert "step 10, from" in printed
    assert newest_valid(folder, pytest.fail).name == newest.name
    for path in folder.glob("step_*.pt"):
        path.write_bytes(b"")
    assert_refused(train(tmp_path, *arguments), "none of the 3 checkpoints")


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
    folder = tmp_path / "run" / "checkpoints"
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    evaluated = [line for line in lines if "val/top1" in line]
    best = max(evaluated, key=lambda line: (line["val/top1"], -line["step"]))
    assert os.readlink(folder / "best.pt") == f"step_{best['step']:08d}.pt"
    assert f"at step {best['step']}" in printed


def test_a_second_signal_does_not_end_the_last_write(tmp_path, digits):
    """The write takes seconds, and the launcher that asked for the end asks again."""

    def entry(arguments):
        real = checkpoint.write_checkpoint

        def slow(path, content, *checks):
            (tmp_path / "writing").touch()
            time.sleep(1.5)
            real(path, content, *checks)

        checkpoint.write_checkpoint = slow
        return cli.main(arguments)

    processes = start_app(
        2,
        [
            "train",
            *options(
                config="configs/quickstart.yaml", data__data_dir=digits, output_dir=tmp_path / "run"
            ),
            *SMALL,
            "--train.epochs",
            "50",
        ],
        str(tmp_path / "printed"),
        entry,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGUSR1)
    while not (tmp_path / "writing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert wait_app(processes) == [128 + signal.SIGUSR1] * 2, (tmp_path / "printed").read_text()
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

        real = builtins.open

        def full(path, mode="r", *args, **kwargs):
            late = (
                ".pt." in str(path)
                and str(path).endswith(".tmp")
                and "step_00000005" not in str(path)
            )
            return real("/dev/full" if late else path, mode, *args, **kwargs)

        builtins.open = full
        return cli.main(arguments)

    codes, printed = train(
        tmp_path, "--data.data_dir", str(digits), "--checkpoint.interval_steps", "5", entry=entry
    )
    assert codes[0] == 2, printed
    assert "warning: could not save the checkpoint of step 10" in printed
    assert "step 5 stays" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"train/loss"') == 12
    assert newest_valid(tmp_path / "run" / "checkpoints", pytest.fail).name == "step_00000005.pt"


@pytest.mark.parametrize(
    "how", ["read-only", "removed", "removed while it is written", "taken by a file"]
)
def test_a_folder_that_stops_taking_checkpoints(tmp_path, digits, how):
    """After step 5. Each try is warned about with the reason; a folder that is merely gone is made
    again.
    """
    folder = tmp_path / "run" / "checkpoints"

    def entry(arguments):
        import builtins

        real, step, write = builtins.open, engine.train_step, checkpoint.write_checkpoint

        def read_only(path, mode="r", *args, **kwargs):
            if (
                ".pt." in str(path)
                and str(path).endswith(".tmp")
                and "step_00000005" not in str(path)
            ):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real(path, mode, *args, **kwargs)

        def train_step(model, state, *rest):
            if (
                state.step == 8
                and os.environ["RANK"] == "0"
                and how in ("removed", "taken by a file")
            ):
                for thread in threading.enumerate():  # of step 5: it may take its time
                    if thread.name == "checkpoint":
                        thread.join()
                folder.rename(folder.with_name("moved"))
                if how == "taken by a file":
                    folder.write_text("")
            return step(model, state, *rest)

        def writing(path, content, before_publishing):
            def vanish():
                before_publishing()
                if content["step"] == 10 and not folder.with_name("moved").exists():
                    folder.rename(folder.with_name("moved"))

            write(path, content, vanish)

        if how == "read-only":
            builtins.open = read_only
        if how == "removed while it is written":
            checkpoint.write_checkpoint = writing
        engine.train_step = train_step
        return cli.main(arguments)

    codes, printed = train(
        tmp_path, "--data.data_dir", str(digits), "--checkpoint.interval_steps", "5", entry=entry
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"train/loss"') == 12
    good = folder if how == "read-only" else folder.with_name("moved")
    assert newest_valid(good, pytest.fail).name == "step_00000005.pt"
    if how.startswith("removed"):
        assert codes == [0, 0] and "warning: could not" not in printed, printed
        assert sorted(path.name for path in folder.glob("*.pt")) == [
            "best.pt",
            "last.pt",
            "step_00000010.pt",
            "step_00000012.pt",
        ]
        assert newest_valid(folder, pytest.fail).name == "step_00000012.pt"
        return
    reason = {"read-only": "Read-only file system", "taken by a file": "File exists"}[how]
    assert codes[0] == 2, printed
    for step in (10, 12):
        assert re.search(
            rf"warning: could not save the checkpoint of step {step} to .*{reason}.*step 5 stays",
            printed,
        )
    assert re.search(r"error \(rank 0\): could not save the checkpoint of step 12", printed)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, digits):
    """While a save takes its time. The first one waits for it; the second, more than a second
    later, for nothing.
    """

    def entry(arguments):
        def slow(path, content, *checks):
            (tmp_path / "writing").touch()
            time.sleep(100)

        checkpoint.write_checkpoint = slow
        return cli.main(arguments)

    processes = start_app(
        2,
        [
            "train",
            *options(
                config="configs/quickstart.yaml", data__data_dir=digits, output_dir=tmp_path / "run"
            ),
            *SMALL,
            *options(
                train__epochs=50, checkpoint__interval_epochs=0, train__eval_interval_epochs=0
            ),
        ],
        str(tmp_path / "printed"),
        entry,
    )  # the signal's save is the only one
    wait_for_step(tmp_path / "run", 2, processes)
    os.kill(processes[0].pid, signal.SIGINT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "writing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.1)
    os.kill(processes[0].pid, signal.SIGINT)
    assert wait_app(processes, timeout=80) == [128 + signal.SIGINT] * 2, (
        tmp_path / "printed"
    ).read_text()
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_steps(tmp_path, digits):
    def entry(arguments):
        real = engine.train_step

        def poisoned(model, state, micro_batches, *rest):
            if state.step >= 4:
                micro_batches[0].images.fill_(torch.nan)
            return real(model, state, micro_batches, *rest)

        engine.train_step = poisoned
        return cli.main(arguments)

    result = train(
        tmp_path, "--data.data_dir", str(digits), "--train.max_nonfinite_steps", "3", entry=entry
    )
    assert_refused(
        result, "the updates 5 to 7", "not finite", "optim.base_lr", "norm nan", "nonfinite.json"
    )
    replay = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert replay["steps"] == [4, 5, 6] and len(replay["lr"]) == 3 and min(replay["lr"]) > 0
    for step, *shares in zip(replay["steps"], *replay["rows_of_ranks"], strict=True):
        rows = [row for share in shares for row in share]
        assert rows == rows_at(0, 0, 1442, np.arange(120 * step, 120 * (step + 1))).tolist()
        assert all(os.path.isfile(replay["files"][str(row)]) for row in rows)


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
