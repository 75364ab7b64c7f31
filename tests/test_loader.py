"""The loaders over files: what is read, in which order, and what happens to bad files."""

import itertools
import json
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    OneProcess,
    assert_same_batches,
    damaged_png,
    encode,
    gather_steps,
    loaders_of_ranks,
    open_split,
    pack_shards,
    picture,
    train_loader,
    val_loader,
    write_split,
)

from resnet_dist.config import AugmentConfig, Config, DataConfig, TrainConfig
from resnet_dist.data.build import build_loaders, build_train_loader, build_val_loader
from resnet_dist.data.pixels import ahead, decoding
from resnet_dist.data.sampling import augment, crops
from resnet_dist.data.types import IGNORED_LABEL, Batch

N = 43
PICTURES = [picture(40 + i % 7, 60 - i % 5, seed=i) for i in range(N)]
GOOD = [encode(image) for image in PICTURES]

# The files that cannot be read, by row.
GIF = encode(picture(20, 20), "GIF")
BAD = {
    3: b"",
    11: GOOD[11][:-100],
    12: b"this is no image",
    20: damaged_png(),
    21: damaged_png(),
    30: GIF[:40],
    N - 1: damaged_png(),
}
# The row that is shown in place of each bad one; row 33 has no file.
REPLACED = {3: 4, 11: 13, 12: 13, 20: 22, 21: 22, 30: 31, 33: 34, N - 1: 0}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return write_split(folder, GOOD)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Bad files of several kinds, a missing one, and a CMYK one, which is none of them."""
    folder = tmp_path_factory.mktemp("mixed")
    files = list(GOOD)
    for row, data in BAD.items():
        files[row] = data
    files[5] = encode(picture(50, 50).convert("CMYK"))
    index = write_split(folder, files)
    os.unlink(index.path(33))
    return index


def steps(index, folder, start, stop, world_size=1, grad_accum_steps=1, **options):
    """The steps [start, stop) of a training, gathered from the ranks."""
    loaders = loaders_of_ranks(
        index,
        folder,
        world_size,
        grad_accum_steps=grad_accum_steps,
        **options,
    )
    shares = []
    for loader in loaders:
        share = list(loader.batches(start, stop))
        assert len(share) == (stop - start) * grad_accum_steps
        shares.append(share)
    return gather_steps(shares, grad_accum_steps)


def one_step(index, folder, **options):
    """The first step of a training."""
    [first] = steps(index, folder, 0, 1, **options)
    return first


def assert_same(found, expected):
    for step, expected_step in zip(found, expected, strict=True):
        assert np.array_equal(step.rows, expected_step.rows)
        assert torch.equal(step.labels, expected_step.labels)
        assert torch.equal(step.images, expected_step.images)


def loader_threads():
    """The names of the threads of all loaders that are open."""
    prefixes = ("loader", "read", "resize")
    thread_names = [thread.name for thread in threading.enumerate()]
    return [name for name in thread_names if name.startswith(prefixes)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(good, tmp_path, world_size):
    steps_per_epoch = 3
    gathered = steps(good, tmp_path, 0, 2 * steps_per_epoch, world_size, global_batch_size=12)
    for step in gathered:
        assert np.array_equal(step.labels, good.labels_of(step.rows))
    first_epoch = gathered[:steps_per_epoch]
    second_epoch = gathered[steps_per_epoch:]
    for epoch in (first_epoch, second_epoch):
        rows = np.concatenate([step.rows for step in epoch])
        assert len(rows) == 36
        assert len(np.unique(rows)) == 36


def test_batches_are_as_the_model_wants_them(good, tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loader = train_loader(good, tmp_path, dtype=dtype)
        [batch] = loader.batches(0, 1)
        assert batch.images.shape == (8, 3, 32, 32)
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert batch.indices.dtype == np.int64
        assert loader.num_samples == N
        assert loader.steps_per_epoch == 5
        assert loader.class_names == ("class0", "class1", "class2")
        loader.close()


def test_samples_and_crops_do_not_depend_on_the_layout(good, tmp_path):
    expected = steps(good, tmp_path, 3, 7, global_batch_size=12)
    layouts = [(2, 1), (3, 2), (1, 4), (4, 1)]
    for world_size, grad_accum_steps in layouts:
        found = steps(good, tmp_path, 3, 7, world_size, grad_accum_steps, global_batch_size=12)
        assert_same(found, expected)


def test_flips_are_those_of_the_plan(good, tmp_path):
    """With the whole image as the window, an image is either itself or its mirror image, and both
    occur.
    """
    whole = {
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1e-3, 1e-3),
        "global_batch_size": N,
        "train_crop_size": 40,
    }
    never = one_step(good, tmp_path, flip_probability=0.0, **whole)
    always = one_step(good, tmp_path, flip_probability=1.0, **whole)
    half = one_step(good, tmp_path, flip_probability=0.5, **whole)
    assert torch.equal(never.images.flip(3), always.images)

    is_flipped = crops.flips(5, 0, half.rows, 0.5)
    assert 5 < is_flipped.sum() < N - 5
    for place in range(N):
        expected = always if is_flipped[place] else never
        assert torch.equal(half.images[place], expected.images[place])


def test_filters_are_those_of_the_plan(good, tmp_path):
    """With a random interpolation, each image is either the bilinear or the bicubic one."""

    def with_filter(name):
        return one_step(good, tmp_path, train_interpolation=name, global_batch_size=N)

    bilinear = with_filter("bilinear").images
    bicubic = with_filter("bicubic").images
    random = with_filter("random")
    is_bicubic = crops.interpolations(5, 0, random.rows, "random") == "bicubic"
    assert 5 < is_bicubic.sum() < N - 5
    for place in range(N):
        expected = bicubic if is_bicubic[place] else bilinear
        assert torch.equal(random.images[place], expected[place])
        assert not torch.equal(bilinear[place], bicubic[place])


EVERYTHING = AugmentConfig(
    policy="randaugment",
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    lighting_std=0.1,
    repeats=2,
    random_erasing=0.5,
)


@pytest.mark.slow
@pytest.mark.parametrize("train_crop", ["random_resized", "scale_jitter", "pad"])
def test_augmentation_does_not_depend_on_the_layout(good, tmp_path, train_crop):
    """With all of it on, and over an epoch's edge where the side of the crop changes."""
    options = {
        "augment": EVERYTHING,
        "train_crop": train_crop,
        "train_interpolation": "random",
        "scale_jitter": (64, 80),
        "train_crop_size": 64,
        "progressive_start_size": 32,
        "progressive_epochs": (0, 2),
        "global_batch_size": 12,
    }
    expected = steps(good, tmp_path, 1, 5, **options)
    sides = [step.images.shape[-1] for step in expected]
    # The side in the middle of the growth, 1.5 times 32, is rounded to 64.
    assert sides == [32, 32, 64, 64]
    layouts = [(3, 2)]
    if train_crop == "random_resized":
        layouts += [(2, 1), (1, 4)]
    for world_size, grad_accum_steps in layouts:
        found = steps(good, tmp_path, 1, 5, world_size, grad_accum_steps, **options)
        assert_same(found, expected)


def test_repetitions_show_an_image_differently(good, tmp_path):
    """Half as many images in a batch, each twice, its copies as far apart as can be and cut in two
    ways.
    """
    twice = AugmentConfig(repeats=2)
    rows, _, images = one_step(good, tmp_path, global_batch_size=12, augment=twice)
    assert np.array_equal(rows[:6], rows[6:])
    assert len(np.unique(rows)) == 6
    for place in range(6):
        assert not torch.equal(images[place], images[place + 6])

    five_times = AugmentConfig(repeats=5)
    with pytest.raises(ValueError, match="augment.repeats is 5"):
        train_loader(good, tmp_path, global_batch_size=12, augment=five_times)


def test_lighting_and_erasing_are_those_of_the_plan(good, tmp_path):
    """Lighting moves each channel of the pixels in [0, 1]; erasing sets a rectangle of the
    normalised image to zero.
    """
    rows, _, plain = one_step(good, tmp_path)

    lighting = AugmentConfig(lighting_std=0.5)
    lit = one_step(good, tmp_path, augment=lighting).images
    # [B, 3], as numbers of standard deviations of the pixels.
    shifts = augment.lighting_shifts(lighting, 5, 0, rows) / np.array(DataConfig().std)
    shifts = torch.from_numpy(shifts).float()
    expected = shifts[:, :, None, None].expand_as(lit)
    torch.testing.assert_close(lit - plain, expected, rtol=1e-4, atol=1e-5)

    erasing = AugmentConfig(random_erasing=1.0)
    erased = one_step(good, tmp_path, augment=erasing).images
    boxes = augment.erasing_boxes(erasing, 5, 0, rows, 32)
    for image, expected, box in zip(erased, plain, boxes, strict=True):
        top, left, height, width = box
        assert height > 0
        assert width > 0
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(image, expected)


def test_every_epoch_has_its_own_crops(good, tmp_path):
    first_epoch, second_epoch = steps(good, tmp_path, 0, 2, global_batch_size=N)
    first_images = first_epoch.images[np.argsort(first_epoch.rows)]
    second_images = second_epoch.images[np.argsort(second_epoch.rows)]
    for first, second in zip(first_images, second_images, strict=True):
        assert not torch.equal(first, second)


def test_stopping_early_and_starting_in_the_middle(good, tmp_path):
    loader = train_loader(good, tmp_path)
    expected = list(loader.batches(0, 10))
    for stopped_after in (1, 2, 5):
        batches = loader.batches(0, 10)
        for _ in range(stopped_after):
            next(batches)
        batches.close()
        # Its own thread has ended; the pools stay.
        assert "loader" not in loader_threads()
        rest = loader.batches(stopped_after, 10)
        assert_same_batches(rest, expected[stopped_after:])
    assert list(loader.batches(3, 3)) == []
    loader.close()
    assert not loader_threads()


def test_a_new_iterator_takes_the_pipeline_over(good, tmp_path):
    loader = train_loader(good, tmp_path)
    [*_, expected] = loader.batches(0, 5)
    abandoned = loader.batches(0, 10)
    next(abandoned)
    assert_same_batches(loader.batches(4, 5), [expected])
    loader.close()
    assert not loader_threads()


@pytest.mark.slow
def test_bad_files_are_replaced_the_same_way_on_every_layout(mixed, tmp_path):
    """Each by the next good file, with its label; everything else as if nothing had happened."""
    on_one_rank = steps(mixed, tmp_path / "one", 0, 10)
    on_two_ranks = steps(mixed, tmp_path / "two", 0, 10, world_size=2, grad_accum_steps=2)
    assert_same(on_two_ranks, on_one_rank)

    loader = train_loader(mixed, tmp_path)
    drawn = [job.rows.tolist() for job in loader.jobs(0, 10)]
    loader.close()
    for step, drawn_rows in zip(on_one_rank, drawn, strict=True):
        expected_rows = [REPLACED.get(row, row) for row in drawn_rows]
        assert step.rows.tolist() == expected_rows
        assert np.array_equal(step.labels, mixed.labels_of(step.rows))
        assert torch.isfinite(step.images).all()

    quarantine = (tmp_path / "one" / "quarantine.jsonl").read_text()
    records = [json.loads(line) for line in quarantine.splitlines()]
    recorded_paths = [record["path"] for record in records]
    bad_rows = REPLACED.keys() & set(itertools.chain(*drawn))
    bad_paths = [mixed.path(row) for row in bad_rows]
    assert sorted(recorded_paths) == sorted(bad_paths)
    assert "the decoder refuses it" in quarantine


def test_mixed_batch_leaves_the_good_images_alone(good, mixed, tmp_path):
    """The crops of good images are those that they have in a clean set."""
    mixed_steps = steps(mixed, tmp_path, 0, 5)
    clean_steps = steps(good, tmp_path, 0, 5)
    # Has another picture in the clean set.
    cmyk_row = 5
    for step, clean in zip(mixed_steps, clean_steps, strict=True):
        is_not_replaced = step.rows == clean.rows
        is_same_picture = is_not_replaced & (clean.rows != cmyk_row)
        assert torch.equal(step.images[is_same_picture], clean.images[is_same_picture])


def test_limit_of_bad_files_stops_the_run(mixed, tmp_path):
    loader = train_loader(mixed, tmp_path, max_bad_images=3)
    message = "4 broken train images.*data.max_bad_images = 3.*quarantine.jsonl"
    with pytest.raises(ValueError, match=message):
        list(loader.batches(0, 10))
    assert loader.num_bad == 4
    loader.close()


SMALL_VAL = {"val_batch_size": 7, "val_resize_size": 36, "val_crop_size": 32}


def evaluated(index, folder, world_size):
    """{row: (label, image)} of an evaluation, in which no row occurs twice."""
    found = {}
    for rank in range(world_size):
        loader = val_loader(index, folder, rank=rank, world_size=world_size, **SMALL_VAL)
        once = list(loader)
        again = list(loader)
        loader.close()
        assert len(once) == loader.rounds
        assert_same_batches(again, once)
        for batch in once:
            if batch is None:
                continue
            rows = batch.indices.tolist()
            labels = batch.labels.tolist()
            for row, label, image in zip(rows, labels, batch.images, strict=True):
                assert row not in found
                found[row] = (label, image)
    return found


def test_validation_counts_every_image_once(mixed, tmp_path):
    """Bad ones too, in one colour and without a label; the same pixels on any number of ranks, and
    in each evaluation.
    """
    alone = evaluated(mixed, tmp_path, 1)
    assert sorted(alone) == list(range(N))
    for row, (label, image) in alone.items():
        if row in REPLACED:
            assert label == IGNORED_LABEL
            brightest = image.amax((1, 2))
            darkest = image.amin((1, 2))
            assert torch.equal(brightest, darkest)
        else:
            assert label == mixed.labels_of(row)
    for world_size in (2, 3):
        found = evaluated(mixed, tmp_path, world_size)
        assert sorted(found) == sorted(alone)
        for row, (label, image) in found.items():
            expected_label, expected_image = alone[row]
            assert label == expected_label
            assert torch.equal(image, expected_image)


def test_validation_that_is_left_early_starts_again(good, tmp_path):
    loader = val_loader(good, tmp_path, **SMALL_VAL)
    first = next(iter(loader))
    again = next(iter(loader))
    assert np.array_equal(again.indices, first.indices)
    assert sum(len(batch.labels) for batch in loader) == N
    loader.close()


def test_an_error_in_the_background_is_raised_in_front(good, tmp_path, monkeypatch):
    loader = train_loader(good, tmp_path)

    def fail(*_, **__):
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "job_geometry", fail)
        with pytest.raises(ArithmeticError):
            next(loader.batches(0, 5))
    # The loader is as good as new.
    assert len(list(loader.batches(0, 2))) == 2
    loader.close()


def test_the_thread_does_not_run_away(good, tmp_path, monkeypatch):
    """No more batches are made than the consumer can be given: memory stays bounded."""
    loader = train_loader(good, tmp_path, prefetch_batches=2)
    made = []
    original = loader.source.load

    def load(job, requested):
        made.append(job.step)
        return original(job, requested)

    monkeypatch.setattr(loader.source, "load", load)
    iterator = loader.batches(0, 50)
    next(iterator)
    time.sleep(0.5)
    taken = 1
    in_queue = 2
    waiting_for_queue = 1
    in_decoder = 2
    assert len(made) <= taken + in_queue + waiting_for_queue + in_decoder
    iterator.close()
    loader.close()


def test_shards_are_the_folder_bit_for_bit(mixed, tmp_path):
    """Packed in any order, bad files with it: rows, labels and pixels are the same, so a run may
    move.
    """
    paths = [Path(mixed.path(row)) for row in range(N)]
    files = [path.read_bytes() for path in paths if path.exists()]
    write_split(tmp_path / "copy", files)
    folder = open_split(tmp_path / "copy")
    any_order = np.random.default_rng(0).permutation(len(files))
    pack_shards(folder, tmp_path / "shards" / "train", any_order, shards=4)
    shards = open_split(tmp_path / "shards")
    assert shards.fingerprint() == folder.fingerprint()

    of_shards = steps(shards, tmp_path, 0, 6, world_size=2)
    of_folder = steps(folder, tmp_path, 0, 6)
    assert_same(of_shards, of_folder)


def test_training_leaves_out_the_listed_images_and_evaluation_does_not(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path, GOOD[:12], split=split)
    (tmp_path / "exclude.txt").write_text(
        "train/class0/0001.jpg\ntrain/class2/0011.jpg\nval/class0/0000.jpg\n"
    )
    config = Config(
        data=DataConfig(
            data_dir=str(tmp_path),
            exclude=str(tmp_path / "exclude.txt"),
            train_crop_size=32,
            val_resize_size=32,
            val_crop_size=32,
        ),
        train=TrainConfig(global_batch_size=10, precision="fp32"),
        output_dir=str(tmp_path),
        seed=1,
    )
    train = build_train_loader(config, OneProcess())
    val = build_val_loader(config, OneProcess())
    assert train.num_samples == 10
    assert val.num_samples == 12

    [batch] = train.batches(0, 1)
    shown = [train.index.name(row) for row in batch.indices.tolist()]
    assert sorted(shown) == [
        "class0/0000.jpg",
        "class0/0002.jpg",
        "class0/0003.jpg",
        "class1/0004.jpg",
        "class1/0005.jpg",
        "class1/0006.jpg",
        "class1/0007.jpg",
        "class2/0008.jpg",
        "class2/0009.jpg",
        "class2/0010.jpg",
    ]
    for name, label in zip(shown, batch.labels.tolist(), strict=True):
        assert name.startswith(f"class{label}/")
    train.close()
    val.close()


@pytest.mark.slow
def test_loaders_of_each_kind_agree_on_the_classes_and_deliver(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "folder", GOOD[:12], split=split)
    num_images = {"folder": 12, "digits": 1442, "synthetic": 1280}
    for kind, expected in num_images.items():
        config = Config(
            data=DataConfig(
                kind=kind,
                data_dir=str(tmp_path / kind),
                train_crop_size=32,
                val_resize_size=32,
                val_crop_size=32,
                val_batch_size=5,
            ),
            train=TrainConfig(global_batch_size=12, grad_accum_steps=2, precision="bf16"),
            output_dir=str(tmp_path),
            seed=1,
        )
        train, val = build_loaders(config, OneProcess())
        assert train.num_samples == expected
        assert train.class_names == val.class_names
        micro_batch_sizes = [len(batch.labels) for batch in train.batches(0, 2)]
        assert micro_batch_sizes == [6, 6, 6, 6]
        first = next(iter(val))
        assert first.images.shape == (5, 3, 32, 32)
        train.close()
        val.close()


def test_too_few_images_for_a_batch(good, tmp_path):
    with pytest.raises(ValueError, match="train.global_batch_size = 64"):
        train_loader(good, tmp_path, global_batch_size=64)
    assert not loader_threads()


def test_a_batch_is_handed_over_to_the_stream_of_the_caller(monkeypatch):
    """The caller's stream waits for the event, and each tensor's memory is kept for it."""
    calls = []

    class Tensor:
        def __init__(self, name):
            self.name = name

        def record_stream(self, stream):
            calls.append((self.name, stream))

    class Stream:
        def wait_event(self, event):
            calls.append(("wait", event))

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    views = (Tensor("view"),)
    batch = Batch(Tensor("images"), Tensor("labels"), np.arange(3), views)

    def made():
        yield ahead.ReadyBatch(batch, "event")

    received = list(ahead.receive(made()))
    assert received == [batch]
    assert calls == [
        ("wait", "event"),
        ("images", stream),
        ("labels", stream),
        ("view", stream),
    ]


def test_a_batch_belongs_to_the_caller_alone(tmp_path):
    """It is freed when the caller drops it, and not while the next one is asked for."""
    pictures = [picture(40, 40, seed) for seed in range(16)]
    index = write_split(tmp_path, [encode(image) for image in pictures])
    loader = train_loader(index, tmp_path)
    batches = loader.batches(0, 4)
    for _ in range(4):
        batch = next(batches)
        reference = weakref.ref(batch.images)
        del batch
        # The thread that made it may still hold it, but never while it waits.
        deadline = time.monotonic() + 30
        while reference() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reference() is None
    batches.close()
    loader.close()
