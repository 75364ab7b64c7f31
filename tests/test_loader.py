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
    damaged_png,
    encode,
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
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.types import IGNORED_LABEL, Batch

N = 43
GOOD = [encode(picture(40 + i % 7, 60 - i % 5, i)) for i in range(N)]


# The files that cannot be read, by row.
BAD = {
    3: b"",
    11: GOOD[11][:-100],
    12: b"this is no image",
    20: damaged_png(),
    21: damaged_png(),
    30: encode(picture(20, 20), "GIF")[:40],
    N - 1: damaged_png(),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return write_split(folder, GOOD)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Bad files of several kinds, a missing one, and a CMYK one, which is none of them."""
    folder = tmp_path_factory.mktemp("mixed")
    files = [BAD.get(i, data) for i, data in enumerate(GOOD)]
    files[5] = encode(picture(50, 50).convert("CMYK"))
    index = write_split(folder, files)
    os.unlink(index.path(33))
    return index


# The row that is shown in place of each bad one; row 33 has no file.
REPLACED = {3: 4, 11: 13, 12: 13, 20: 22, 21: 22, 30: 31, 33: 34, N - 1: 0}


def steps(index, folder, start, stop, world_size=1, grad_accum_steps=1, **options):
    """Per step: rows, labels and images of the global batch, gathered from the ranks in the order
    of the positions.
    """
    shares = []
    for rank in range(world_size):
        loader = train_loader(
            index,
            folder,
            rank=rank,
            world_size=world_size,
            grad_accum_steps=grad_accum_steps,
            **options,
        )
        share = list(loader.batches(start, stop))
        loader.close()
        assert len(share) == (stop - start) * grad_accum_steps
        shares.append(share)
    gathered = []
    for step in range(stop - start):
        batches = []
        for micro_step in range(grad_accum_steps):
            place = step * grad_accum_steps + micro_step
            batches += [share[place] for share in shares]
        rows = np.concatenate([batch.indices for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        images = torch.cat([batch.images for batch in batches])
        gathered.append((rows, labels, images))
    return gathered


def one_step(index, folder, **options):
    """Rows, labels and images of the first step."""
    [gathered] = steps(index, folder, 0, 1, **options)
    return gathered


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        rows, labels, images = one
        other_rows, other_labels, other_images = other
        assert np.array_equal(rows, other_rows)
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


def loader_threads():
    prefixes = ("loader", "read", "resize")
    return [each.name for each in threading.enumerate() if each.name.startswith(prefixes)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(good, tmp_path, world_size):
    steps_per_epoch = 3
    gathered = steps(good, tmp_path, 0, 2 * steps_per_epoch, world_size, global_batch_size=12)
    for rows, labels, _ in gathered:
        assert np.array_equal(labels, good.labels_of(rows))
    for epoch in (gathered[:steps_per_epoch], gathered[steps_per_epoch:]):
        rows_of_epoch = np.concatenate([rows for rows, _, _ in epoch])
        assert len(set(rows_of_epoch.tolist())) == len(rows_of_epoch) == 36


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
    for world_size, accumulated in [(2, 1), (3, 2), (1, 4), (4, 1)]:
        found = steps(good, tmp_path, 3, 7, world_size, accumulated, global_batch_size=12)
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
    _, _, never = one_step(good, tmp_path, flip_probability=0.0, **whole)
    _, _, always = one_step(good, tmp_path, flip_probability=1.0, **whole)
    rows, _, half = one_step(good, tmp_path, flip_probability=0.5, **whole)
    assert torch.equal(never.flip(3), always)
    is_flipped = crops.flips(5, 0, rows, 0.5)
    assert 5 < is_flipped.sum() < N - 5
    for place in range(N):
        expected = always if is_flipped[place] else never
        assert torch.equal(half[place], expected[place])


def test_filters_are_those_of_the_plan(good, tmp_path):
    """With a random interpolation, each image is either the bilinear or the bicubic one."""
    shown = {}
    for interpolation in ("bilinear", "bicubic", "random"):
        rows, _, shown[interpolation] = one_step(
            good, tmp_path, train_interpolation=interpolation, global_batch_size=N
        )
    is_bicubic = crops.interpolations(5, 0, rows, "random") == "bicubic"
    assert 5 < is_bicubic.sum() < N - 5
    for place in range(N):
        name = "bicubic" if is_bicubic[place] else "bilinear"
        assert torch.equal(shown["random"][place], shown[name][place])
        assert not torch.equal(shown["bilinear"][place], shown["bicubic"][place])


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
    # The side in the middle of the growth, 1.5 times 32, is rounded to 64.
    assert [images.shape[-1] for _, _, images in expected] == [32, 32, 64, 64]
    layouts = [(3, 2)]
    if train_crop == "random_resized":
        layouts += [(2, 1), (1, 4)]
    for world_size, accumulated in layouts:
        found = steps(good, tmp_path, 1, 5, world_size, accumulated, **options)
        assert_same(found, expected)


def test_repetitions_show_an_image_differently(good, tmp_path):
    """Half as many images in a batch, each twice, its copies as far apart as can be and cut in two
    ways.
    """
    augment_twice = AugmentConfig(repeats=2)
    rows, _, images = one_step(good, tmp_path, global_batch_size=12, augment=augment_twice)
    assert np.array_equal(rows[:6], rows[6:])
    assert len(set(rows.tolist())) == 6
    for place in range(6):
        assert not torch.equal(images[place], images[place + 6])
    with pytest.raises(ValueError, match="augment.repeats is 5"):
        train_loader(good, tmp_path, global_batch_size=12, augment=AugmentConfig(repeats=5))


def test_lighting_and_erasing_are_those_of_the_plan(good, tmp_path):
    """Lighting moves each channel of the pixels in [0, 1]; erasing sets a rectangle of the
    normalised image to zero.
    """
    rows, _, plain = one_step(good, tmp_path)

    lighting = AugmentConfig(lighting_std=0.5)
    _, _, lit = one_step(good, tmp_path, augment=lighting)
    shifts = augment.lighting_shifts(lighting, 5, 0, rows) / np.array(DataConfig().std)
    expected = torch.from_numpy(shifts).float()[:, :, None, None].expand_as(lit)
    torch.testing.assert_close(lit - plain, expected, rtol=1e-4, atol=1e-5)

    erasing = AugmentConfig(random_erasing=1.0)
    _, _, erased = one_step(good, tmp_path, augment=erasing)
    boxes = augment.erasing_boxes(erasing, 5, 0, rows, 32)
    for image, expected, (y, x, h, w) in zip(erased, plain, boxes, strict=True):
        expected[:, y : y + h, x : x + w] = 0
        assert torch.equal(image, expected)
        assert h * w > 0


def test_every_epoch_has_its_own_crops(good, tmp_path):
    (rows, _, images), (other_rows, _, other_images) = steps(
        good, tmp_path, 0, 2, global_batch_size=N
    )
    for image, other in zip(
        images[np.argsort(rows)], other_images[np.argsort(other_rows)], strict=True
    ):
        assert not torch.equal(image, other)


def assert_same_batches(found, expected):
    for batch, other in zip(found, expected, strict=True):
        assert np.array_equal(batch.indices, other.indices)
        assert torch.equal(batch.images, other.images)


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
        assert_same_batches(loader.batches(stopped_after, 10), expected[stopped_after:])
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
    one = steps(mixed, tmp_path / "one", 0, 10)
    two = steps(mixed, tmp_path / "two", 0, 10, world_size=2, grad_accum_steps=2)
    assert_same(one, two)
    loader = train_loader(mixed, tmp_path)
    drawn = [job.rows.tolist() for job in loader.jobs(0, 10)]
    loader.close()
    for (rows, labels, images), drawn_rows in zip(one, drawn, strict=True):
        assert rows.tolist() == [REPLACED.get(row, row) for row in drawn_rows]
        assert np.array_equal(labels, mixed.labels_of(rows))
        assert torch.isfinite(images).all()

    quarantine = (tmp_path / "one" / "quarantine.jsonl").read_text()
    records = [json.loads(line) for line in quarantine.splitlines()]
    bad_rows = set(itertools.chain(*drawn)) & REPLACED.keys()
    assert sorted(record["path"] for record in records) == sorted(map(mixed.path, bad_rows))
    assert "the decoder refuses it" in quarantine


def test_mixed_batch_leaves_the_good_images_alone(good, mixed, tmp_path):
    """The crops of good images are those that they have in a clean set."""
    dirty = steps(mixed, tmp_path, 0, 5)
    clean = steps(good, tmp_path, 0, 5)
    # Has another picture in the clean set.
    cmyk_row = 5
    for (rows, _, images), (clean_rows, _, expected) in zip(dirty, clean, strict=True):
        is_good = (rows == clean_rows) & (clean_rows != cmyk_row)
        assert torch.equal(images[is_good], expected[is_good])


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
        for batch, same in zip(once, again, strict=True):
            if batch is None:
                assert same is None
                continue
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.labels, same.labels)
            for row, label, image in zip(
                batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True
            ):
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
            assert torch.equal(image.amax((1, 2)), image.amin((1, 2)))
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
    there = [row for row in range(N) if os.path.exists(mixed.path(row))]
    write_split(tmp_path / "copy", [Path(mixed.path(row)).read_bytes() for row in there])
    folder = build_index(str(tmp_path / "copy"), "train", OneProcess())
    any_order = np.random.default_rng(0).permutation(len(there))
    pack_shards(folder, tmp_path / "shards" / "train", any_order, shards=4)
    shards = build_index(str(tmp_path / "shards"), "train", OneProcess())
    assert shards.fingerprint() == folder.fingerprint()
    assert_same(steps(shards, tmp_path, 0, 6, world_size=2), steps(folder, tmp_path, 0, 6))


def test_training_leaves_out_the_listed_images_and_evaluation_does_not(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path, GOOD[:12], split=split)
    (tmp_path / "exclude.txt").write_text(
        "train/class0/0001.jpg\ntrain/class2/0011.jpg\nval/class0/0000.jpg\n"
    )
    data = DataConfig(
        data_dir=str(tmp_path),
        exclude=str(tmp_path / "exclude.txt"),
        train_crop_size=32,
        val_resize_size=32,
        val_crop_size=32,
    )
    train_config = TrainConfig(global_batch_size=10, precision="fp32")
    config = Config(data=data, train=train_config, output_dir=str(tmp_path), seed=1)
    train = build_train_loader(config, OneProcess())
    val = build_val_loader(config, OneProcess())
    assert train.num_samples == 10
    assert val.num_samples == 12
    [batch] = train.batches(0, 1)
    shown = [train.index.name(row) for row in batch.indices.tolist()]
    kept = [i for i in range(12) if i not in (1, 11)]
    assert sorted(shown) == [f"class{i // 4}/{i:04d}.jpg" for i in kept]
    for name, label in zip(shown, batch.labels.tolist(), strict=True):
        assert name.startswith(f"class{label}/")
    train.close()
    val.close()


@pytest.mark.slow
def test_loaders_of_each_kind_agree_on_the_classes_and_deliver(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "folder", GOOD[:12], split=split)
    sizes = {"train_crop_size": 32, "val_resize_size": 32, "val_crop_size": 32, "val_batch_size": 5}
    for kind, count in (("folder", 12), ("digits", 1442), ("synthetic", 1280)):
        data = DataConfig(kind=kind, data_dir=str(tmp_path / kind), **sizes)
        train_config = TrainConfig(global_batch_size=12, grad_accum_steps=2, precision="bf16")
        config = Config(data=data, train=train_config, output_dir=str(tmp_path), seed=1)
        train, val = build_loaders(config, OneProcess())
        assert train.num_samples == count
        assert train.class_names == val.class_names
        assert [len(batch.labels) for batch in train.batches(0, 2)] == [6, 6, 6, 6]
        assert next(iter(val)).images.shape == (5, 3, 32, 32)
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
    batch = Batch(Tensor("images"), Tensor("labels"), np.arange(3), (Tensor("view"),))

    def made():
        yield ahead.ReadyBatch(batch, "event")

    assert list(ahead.receive(made())) == [batch]
    assert calls == [("wait", "event"), ("images", stream), ("labels", stream), ("view", stream)]


def test_a_batch_belongs_to_the_caller_alone(tmp_path):
    """It is freed when the caller drops it, and not while the next one is asked for."""
    index = write_split(tmp_path, [encode(picture(40, 40, i)) for i in range(16)])
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
