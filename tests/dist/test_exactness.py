"""Interrupted and uninterrupted runs end with the same weights. (Other numbers of ranks:
tests/chaos/test_chaos.py.)

The application runs whole, in forked processes: JPEG files, DALI, DDP, SyncBatchNorm, checkpoints.
"""

import itertools
import json
import os
import re
import shutil
import signal
import time

import pytest
from dist_utils import (
    CLOCK_KEYS,
    TINY_NETWORK,
    equal_trees,
    options,
    run_app,
    slow_from,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
)
from image_files import encode, picture, write_split

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint

STEPS = 24


def arguments(digits, output_dir, *more):
    """Twelve steps an epoch on small images, each step logged, a checkpoint every five steps and at
    each epoch.
    """
    return [
        "train",
        *small_run(
            data__data_dir=digits,
            output_dir=output_dir,
            model__name=TINY_NETWORK,
            train__epochs=2,
            train__ema_decay=0.9,
            train__label_smoothing=0.1,
            checkpoint__interval_steps=5,
        ),
        *more,
    ]


def final(output_dir):
    content = unpack_checkpoint(read_checkpoint(output_dir / "checkpoints" / "last.pt"), "last.pt")
    assert content["step"] == STEPS
    return content


def metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def comparable(lines):
    """The lines without what depends on the clock; so do the bad files that an attempt, reading
    ahead, has met.
    """
    left_out = {*CLOCK_KEYS, "train/bad_images"}
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


def assert_same_run(a, b):
    left, right = final(a), final(b)
    for key in ("model", "ema", "optimizer", "best_top1", "best_step"):
        assert equal_trees(left[key], right[key]), key
    assert comparable(metrics(a)) == comparable(metrics(b))


def resumed_steps(output_dir):
    """The steps from which the run's attempts went on, as they said."""
    return [
        int(step)
        for step in re.findall(r"; step (\d+), from \S*step_", (output_dir / "log").read_text())
    ]


def kill_at(step, saved, world_size, command, folder):
    """Start all ranks and kill them at `step`, once the checkpoint of `saved` is there."""
    processes = start_app(world_size, command, str(folder / "log"), slow_from(step))
    wait_for_step(folder, step, processes, saved)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    assert wait_app(processes) == [-signal.SIGKILL] * world_size


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_app(2, arguments(digits, folder), str(folder / "log")) == [0, 0], (
        folder / "log"
    ).read_text()
    return folder


# `make chaos` and tests/chaos kill the same run at random places.
@pytest.mark.long
def test_killed_three_times_ends_bit_identically(digits, undisturbed, tmp_path):
    # before the first checkpoint, and between two
    for step, saved in ((3, -1), (9, 5), (17, 10)):
        kill_at(step, saved, 2, arguments(digits, tmp_path), tmp_path)
    assert run_app(2, arguments(digits, tmp_path), str(tmp_path / "log")) == [0, 0], (
        tmp_path / "log"
    ).read_text()
    resumed = resumed_steps(tmp_path)
    assert len(resumed) == 2
    assert resumed[0] >= 5 and resumed[1] >= 10
    assert_same_run(tmp_path, undisturbed)


def test_signals_lose_no_step(digits, undisturbed, tmp_path):
    """All ranks agree on the step, save there and leave with 128 + signal, also when one alone was
    told.
    """
    for at, number, everyone in (
        (3, signal.SIGTERM, True),
        (9, signal.SIGINT, False),
        (15, signal.SIGUSR1, False),
    ):
        processes = start_app(2, arguments(digits, tmp_path), str(tmp_path / "log"), slow_from(at))
        wait_for_step(tmp_path, at, processes)
        for process in processes if everyone else processes[1:]:
            os.kill(process.pid, number)
        assert wait_app(processes) == [128 + number] * 2
        stopped = unpack_checkpoint(
            read_checkpoint(tmp_path / "checkpoints" / "last.pt"), "last.pt"
        )["step"]
        assert stopped >= at and metrics(tmp_path)[-1]["step"] == stopped
        stops = [*resumed_steps(tmp_path), stopped]
    assert run_app(2, arguments(digits, tmp_path), str(tmp_path / "log")) == [0, 0]
    assert resumed_steps(tmp_path) == stops and len(stops) == 3
    assert_same_run(tmp_path, undisturbed)


def test_clock_locale_umask_and_home_have_no_effect(digits, undisturbed, tmp_path):
    """Row of the table of faults: a clock that jumps back and forth, Turkish, no rights for others,
    a home that is none.
    """

    def entry(arguments):
        real, calls = time.time, itertools.count()
        time.time = lambda: real() + (-1) ** next(calls) * 1e7
        time.time_ns = lambda: int(time.time() * 1e9)
        os.umask(0o077)
        os.environ.pop("HOME", None) if os.environ["RANK"] == "0" else os.environ.update(
            HOME="/dev/null/home"
        )
        os.environ.update(LC_ALL="tr_TR.UTF-8", LANG="C", TZ="Pacific/Kiritimati")
        time.tzset()
        return cli.main(arguments)

    processes = start_app(
        2, arguments(digits, tmp_path), str(tmp_path / "log"), slow_from(8, entry)
    )
    wait_for_step(tmp_path, 8, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert wait_app(processes) == [143, 143], (tmp_path / "log").read_text()
    assert run_app(2, arguments(digits, tmp_path), str(tmp_path / "log"), entry) == [0, 0], (
        tmp_path / "log"
    ).read_text()
    assert_same_run(tmp_path, undisturbed)


def test_three_ranks_resume_bit_identically(digits, tmp_path):
    """With more than two ranks the order of additions in an all-reduce depends on the buckets of
    DDP.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    kill_at(7, 5, 3, arguments(digits, parts), parts)
    for folder in (whole, parts):
        assert run_app(3, arguments(digits, folder), str(folder / "log")) == [0, 0, 0], (
            folder / "log"
        ).read_text()
    assert not resumed_steps(whole)
    assert len(resumed_steps(parts)) == 1
    assert_same_run(whole, parts)


def test_all_of_the_augmentation_resumes_bit_identically(tmp_path):
    """Policies, jitter, lighting, erasing, repetitions, mixing and a side that grows, from 32 to 64
    in the second of four epochs: functions of the step as well.
    """
    for split, count in (("train", 48), ("val", 20)):
        write_split(
            str(tmp_path / "data"), [encode(picture(70, 80, i)) for i in range(count)], split=split
        )
    more = options(
        data__kind="folder",
        augment__policy="trivialaugment",
        augment__color_jitter="[0.4,0.4,0.4,0.1]",
        augment__lighting_std=0.1,
        augment__random_erasing=0.3,
        augment__repeats=2,
        augment__mixup_alpha=0.2,
        augment__cutmix_alpha=1.0,
        data__train_crop_size=64,
        data__progressive_start_size=32,
        data__progressive_epochs="[0,2]",
        data__crop_scale="[0.3,1]",
        train__global_batch_size=8,
        train__epochs=4,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    kill_at(9, 5, 2, arguments(tmp_path / "data", parts, *more), parts)
    for folder in (whole, parts):
        assert run_app(2, arguments(tmp_path / "data", folder, *more), str(folder / "log")) == [
            0,
            0,
        ], (folder / "log").read_text()
    assert len(resumed_steps(parts)) == 1
    assert_same_run(whole, parts)


def test_a_checkpoint_that_appears_during_the_start_is_not_lost(digits, undisturbed, tmp_path):
    """An earlier attempt saves between the moment when this one has found nothing and its claim.
    Starting from scratch would cut the lines of the earlier attempt from metrics.jsonl.
    """
    checkpoints = tmp_path / "checkpoints"
    saved = undisturbed / "checkpoints" / "step_00000020.pt"
    lines = "".join((undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)[:10])

    def meet_an_earlier_attempt(words):
        from resnet_dist import run

        claim = run.claim_folder

        def save_and_claim(*parts):
            if os.environ["RANK"] == "0":
                checkpoints.mkdir()
                shutil.copy(saved, checkpoints)
                (tmp_path / "metrics.jsonl").write_text(lines)
            claim(*parts)

        run.claim_folder = save_and_claim
        return cli.main(words)

    log = tmp_path / "log"
    words = arguments(digits, tmp_path)
    assert run_app(2, words, str(log), meet_an_earlier_attempt) == [75, 75]
    assert log.read_text().count("saved step_00000020.pt while this one started") == 1
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert run_app(2, words, str(log)) == [0, 0]
    assert "step 20, from" in log.read_text()
    assert equal_trees(final(tmp_path)["model"], final(undisturbed)["model"])


def test_a_finished_run_is_not_trained_again(digits, undisturbed):
    before = final(undisturbed)
    assert run_app(2, arguments(digits, undisturbed), str(undisturbed / "again")) == [0, 0]
    assert "finished" in (undisturbed / "again").read_text()
    assert equal_trees(before["model"], final(undisturbed)["model"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluate_counts_the_same_on_any_number_of_ranks(undisturbed, tmp_path, world_size):
    output = tmp_path / "out"
    code = run_app(
        world_size,
        [
            "evaluate",
            "--json",
            "--checkpoint",
            str(undisturbed / "checkpoints" / "last.pt"),
            "--data.val_batch_size",
            "50",
        ],
        str(output),
    )
    assert code == [0] * world_size, output.read_text()
    result = json.loads(output.read_text().splitlines()[-1])
    logged = [line for line in metrics(undisturbed) if "val/top1" in line][-1]
    for name, prefix in (("model", "val"), ("ema", "val_ema")):
        assert result[name]["num"] == 355
        for count in ("correct1", "correct5"):
            assert result[name][count] == logged[f"{prefix}/{count}"]
