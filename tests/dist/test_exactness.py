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
    TINY_NETWORK,
    equal_trees,
    last_checkpoint,
    logged_lines,
    options,
    run_app,
    run_to_the_end,
    slow_from,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
    without_clock,
)
from image_files import encode, picture, write_split

from resnet_dist import cli

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
    """The last checkpoint of a run that has ended."""
    content = last_checkpoint(output_dir)
    assert content["step"] == STEPS
    return content


def comparable_lines(output_dir):
    """What a run has logged, without what depends on the clock. The number of bad files does, since
    an attempt reads ahead.
    """
    lines = without_clock(logged_lines(output_dir))
    for line in lines:
        line.pop("train/bad_images", None)
    return lines


def assert_same_run(output_dir, expected_dir):
    """Both runs have ended, with the same state and the same lines."""
    found = final(output_dir)
    expected = final(expected_dir)
    for key in ("model", "ema", "optimizer", "best_top1", "best_step"):
        assert equal_trees(found[key], expected[key]), key
    assert comparable_lines(output_dir) == comparable_lines(expected_dir)


def resumed_steps(output_dir):
    """The steps from which the run's attempts went on, as they said."""
    printed = (output_dir / "log").read_text()
    steps = re.findall(r"; step (\d+), from \S*step_", printed)
    return [int(step) for step in steps]


def kill_at(step, saved, world_size, command, folder):
    """Start all ranks and kill them at `step`, once the checkpoint of `saved` is there."""
    log = folder / "log"
    processes = start_app(world_size, command, str(log), slow_from(step))
    wait_for_step(folder, step, processes, saved)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    codes = wait_app(processes)
    assert codes == [-signal.SIGKILL] * world_size


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(2, arguments(digits, folder), folder)
    return folder


@pytest.fixture
def whole(tmp_path):
    """A folder for an uninterrupted run."""
    folder = tmp_path / "whole"
    folder.mkdir()
    return folder


@pytest.fixture
def parts(tmp_path):
    """A folder for a run that is killed and resumed."""
    folder = tmp_path / "parts"
    folder.mkdir()
    return folder


# `make chaos` and tests/chaos kill the same run at random places.
@pytest.mark.long
def test_killed_three_times_ends_bit_identically(digits, undisturbed, tmp_path):
    """Killed before the first checkpoint, and twice between two."""
    words = arguments(digits, tmp_path)
    kill_at(3, -1, 2, words, tmp_path)
    kill_at(9, 5, 2, words, tmp_path)
    kill_at(17, 10, 2, words, tmp_path)
    run_to_the_end(2, words, tmp_path)
    first, second = resumed_steps(tmp_path)
    assert first >= 5
    assert second >= 10
    assert_same_run(tmp_path, undisturbed)


def test_signals_lose_no_step(digits, undisturbed, tmp_path):
    """All ranks agree on the step, save there and leave with 128 + signal, also when one alone was
    told.
    """
    words = arguments(digits, tmp_path)
    log = tmp_path / "log"
    stops = []
    for step, number, ranks in (
        (3, signal.SIGTERM, (0, 1)),
        (9, signal.SIGINT, (1,)),
        (15, signal.SIGUSR1, (1,)),
    ):
        processes = start_app(2, words, str(log), slow_from(step))
        wait_for_step(tmp_path, step, processes)
        for rank in ranks:
            os.kill(processes[rank].pid, number)
        assert wait_app(processes) == [128 + number] * 2

        stopped = last_checkpoint(tmp_path)["step"]
        last_line = logged_lines(tmp_path)[-1]
        assert stopped >= step
        assert last_line["step"] == stopped
        assert resumed_steps(tmp_path) == stops
        stops.append(stopped)
    run_to_the_end(2, words, tmp_path)
    assert resumed_steps(tmp_path) == stops
    assert_same_run(tmp_path, undisturbed)


def test_clock_locale_umask_and_home_have_no_effect(digits, undisturbed, tmp_path):
    """Row of the table of faults: a clock that jumps back and forth, Turkish, no rights for others,
    a home that is none.
    """

    def in_odd_environment(arguments):
        real_time = time.time
        calls = itertools.count()

        def jumping_time():
            direction = (-1) ** next(calls)
            return real_time() + direction * 1e7

        time.time = jumping_time
        time.time_ns = lambda: int(jumping_time() * 1e9)
        os.umask(0o077)
        if os.environ["RANK"] == "0":
            os.environ.pop("HOME", None)
        else:
            os.environ["HOME"] = "/dev/null/home"
        os.environ.update(LC_ALL="tr_TR.UTF-8", LANG="C", TZ="Pacific/Kiritimati")
        time.tzset()
        return cli.main(arguments)

    words = arguments(digits, tmp_path)
    log = tmp_path / "log"
    processes = start_app(2, words, str(log), slow_from(8, in_odd_environment))
    wait_for_step(tmp_path, 8, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes = wait_app(processes)
    assert codes == [128 + signal.SIGTERM] * 2, log.read_text()
    run_to_the_end(2, words, tmp_path, in_odd_environment)
    assert_same_run(tmp_path, undisturbed)


def test_three_ranks_resume_bit_identically(digits, whole, parts):
    """With more than two ranks the order of additions in an all-reduce depends on the buckets of
    DDP.
    """
    kill_at(7, 5, 3, arguments(digits, parts), parts)
    for folder in (whole, parts):
        run_to_the_end(3, arguments(digits, folder), folder)
    assert resumed_steps(whole) == []
    assert len(resumed_steps(parts)) == 1
    assert_same_run(whole, parts)


def test_all_of_the_augmentation_resumes_bit_identically(tmp_path, whole, parts):
    """Policies, jitter, lighting, erasing, repetitions, mixing and a side that grows, from 32 to 64
    in the second of four epochs: functions of the step as well.
    """
    data = tmp_path / "data"
    for split, count in (("train", 48), ("val", 20)):
        images = [encode(picture(70, 80, seed)) for seed in range(count)]
        write_split(str(data), images, split=split)
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
    kill_at(9, 5, 2, arguments(data, parts, *more), parts)
    for folder in (whole, parts):
        run_to_the_end(2, arguments(data, folder, *more), folder)
    assert len(resumed_steps(parts)) == 1
    assert_same_run(whole, parts)


def test_a_checkpoint_that_appears_during_the_start_is_not_lost(digits, undisturbed, tmp_path):
    """An earlier attempt saves between the moment when this one has found nothing and its claim.
    Starting from scratch would cut the lines of the earlier attempt from metrics.jsonl.
    """
    checkpoints = tmp_path / "checkpoints"
    metrics = tmp_path / "metrics.jsonl"
    saved = undisturbed / "checkpoints" / "step_00000020.pt"
    all_lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    first_lines = "".join(all_lines[:10])

    def meet_an_earlier_attempt(words):
        from resnet_dist import run

        claim = run.claim_folder

        def save_and_claim(*parts):
            if os.environ["RANK"] == "0":
                checkpoints.mkdir()
                shutil.copy(saved, checkpoints)
                metrics.write_text(first_lines)
            claim(*parts)

        run.claim_folder = save_and_claim
        return cli.main(words)

    log = tmp_path / "log"
    words = arguments(digits, tmp_path)
    codes = run_app(2, words, str(log), meet_an_earlier_attempt)
    assert codes == [75, 75]
    assert log.read_text().count("saved step_00000020.pt while this one started") == 1
    assert metrics.read_text() == first_lines

    run_to_the_end(2, words, tmp_path)
    assert "step 20, from" in log.read_text()
    weights = final(tmp_path)["model"]
    assert equal_trees(weights, final(undisturbed)["model"])


def test_a_finished_run_is_not_trained_again(digits, undisturbed):
    before = final(undisturbed)
    log = undisturbed / "again"
    codes = run_app(2, arguments(digits, undisturbed), str(log))
    assert codes == [0, 0]
    assert "finished" in log.read_text()
    after = final(undisturbed)
    assert equal_trees(before["model"], after["model"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluate_counts_the_same_on_any_number_of_ranks(undisturbed, tmp_path, world_size):
    """And the same as the last evaluation of the training."""
    words = [
        "evaluate",
        "--json",
        *("--checkpoint", str(undisturbed / "checkpoints" / "last.pt")),
        *("--data.val_batch_size", "50"),
    ]
    run_to_the_end(world_size, words, tmp_path)
    printed = (tmp_path / "log").read_text()
    counts = json.loads(printed.splitlines()[-1])
    evaluations = [line for line in logged_lines(undisturbed) if "val/top1" in line]
    last = evaluations[-1]
    for name, prefix in (("model", "val"), ("ema", "val_ema")):
        assert counts[name]["num"] == 355
        for count in ("correct1", "correct5"):
            assert counts[name][count] == last[f"{prefix}/{count}"]
