"""The loaders over files: what is read, in which order, and what happens to bad files."""

import itertools
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    OneProcess,
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


def decoder_refuses() -> bytes:
    """Passes the cheap checks, but its compressed data is none."""
    data = bytearray(encode(picture(40, 40), "PNG"))
    start = data.index(b"IDAT") + 6
    data[start : start + 40] = b"\xff" * 40
    return bytes(data)


BAD = {
    3: b"",
    11: GOOD[11][:-100],
    12: b"this is no image",
    20: decoder_refuses(),
    21: decoder_refuses(),
    30: encode(picture(20, 20), "GIF")[:40],
    N - 1: decoder_refuses(),
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


REPLACED = {3: 4, 11: 13, 12: 13, 20: 22, 21: 22, 30: 31, 33: 34, N - 1: 0}


def steps(index, folder, start, stop, world_size=1, grad_accum_steps=1, **options):
    """Per step: rows, labels and images of the global batch, gathered from the ranks in the order
    of the positions.
    """
    layout = {"world_size": world_size, "grad_accum_steps": grad_accum_steps}
    loaders = [
        train_loader(index, folder, rank=rank, **layout, **options) for rank in range(world_size)
    ]
    shares = [list(one.batches(start, stop)) for one in loaders]
    for one in loaders:
        one.close()
    assert {len(share) for share in shares} == {(stop - start) * grad_accum_steps}
    gathered = []
    for step in range(stop - start):
        batches = [
            shares[rank][step * grad_accum_steps + micro]
            for micro in range(grad_accum_steps)
            for rank in range(world_size)
        ]
        gathered.append(
            (
                np.concatenate([batch.indices for batch in batches]),
                torch.cat([b.labels for b in batches]),
                torch.cat([batch.images for batch in batches]),
            )
        )
    return gathered


def assert_same(first, second):
    assert len(first) == len(second)
    for (rows, labels, images), (other_rows, other_labels, other_images) in zip(
        first, second, strict=True
    ):
        assert np.array_equal(rows, other_rows)
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


def loader_threads():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(("loader", "read", "resize"))
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(good, tmp_path, world_size):
    gathered = steps(
        good, tmp_path, 0, 6, world_size, global_batch_size=12
    )  # two epochs of three steps
    for epoch in range(2):
        rows = np.concatenate([rows for rows, _, _ in gathered[3 * epoch : 3 * epoch + 3]])
        assert len(set(rows.tolist())) == len(rows) == 36
    for rows, labels, _ in gathered:
        assert np.array_equal(labels, good.labels_of(rows))


def test_batches_are_as_the_model_wants_them(good, tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loader = train_loader(good, tmp_path, dtype=dtype)
        (batch,) = loader.batches(0, 1)
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
        assert_same(
            steps(good, tmp_path, 3, 7, world_size, accumulated, global_batch_size=12), expected
        )


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
    never, always, half = (
        steps(good, tmp_path, 0, 1, flip_probability=p, **whole)[0] for p in (0.0, 1.0, 0.5)
    )
    assert torch.equal(never[2].flip(3), always[2])
    flipped = crops.flips(5, 0, half[0], 0.5)
    assert 5 < flipped.sum() < N - 5
    assert torch.equal(
        half[2], torch.where(torch.from_numpy(flipped)[:, None, None, None], always[2], never[2])
    )


def test_filters_are_those_of_the_plan(good, tmp_path):
    """With a random interpolation, each image is either the bilinear or the bicubic one."""
    shown = {}
    for interpolation in ("bilinear", "bicubic", "random"):
        options = {"train_interpolation": interpolation, "global_batch_size": N}
        rows, _, shown[interpolation] = steps(good, tmp_path, 0, 1, **options)[0]
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
    assert [images.shape[-1] for _, _, images in expected] == [
        32,
        32,
        64,
        64,
    ]  # round(1.5) is 2, to even
    for world_size, accumulated in (
        [(2, 1), (3, 2), (1, 4)] if train_crop == "random_resized" else [(3, 2)]
    ):
        assert_same(steps(good, tmp_path, 1, 5, world_size, accumulated, **options), expected)


def test_repetitions_show_an_image_differently(good, tmp_path):
    """Half as many images in a batch, each twice, its copies as far apart as can be and cut in two
    ways.
    """
    ((rows, _, images),) = steps(
        good, tmp_path, 0, 1, global_batch_size=12, augment=AugmentConfig(repeats=2)
    )
    assert np.array_equal(rows[:6], rows[6:])
    assert len(set(rows.tolist())) == 6
    assert not any(torch.equal(a, b) for a, b in zip(images[:6], images[6:], strict=True))
    with pytest.raises(ValueError, match="augment.repeats is 5"):
        train_loader(good, tmp_path, global_batch_size=12, augment=AugmentConfig(repeats=5))


def test_lighting_and_erasing_are_those_of_the_plan(good, tmp_path):
    """Lighting moves each channel of the pixels in [0, 1]; erasing sets a rectangle of the
    normalised image to zero.
    """
    ((rows, _, plain),) = steps(good, tmp_path, 0, 1)
    ((_, _, lit),) = steps(good, tmp_path, 0, 1, augment=AugmentConfig(lighting_std=0.5))
    moved = augment.lighting_shifts(AugmentConfig(lighting_std=0.5), 5, 0, rows) / np.array(
        DataConfig().std
    )
    torch.testing.assert_close(
        lit - plain,
        torch.from_numpy(moved)[:, :, None, None].float().expand_as(lit),
        rtol=1e-4,
        atol=1e-5,
    )
    erasing = AugmentConfig(random_erasing=1.0)
    ((_, _, erased),) = steps(good, tmp_path, 0, 1, augment=erasing)
    boxes = augment.erasing_boxes(erasing, 5, 0, rows, 32)
    for image, before, (y, x, h, w) in zip(erased, plain, boxes, strict=True):
        before[:, y : y + h, x : x + w] = 0
        assert torch.equal(image, before)
        assert h * w > 0


def test_every_epoch_has_its_own_crops(good, tmp_path):
    first, second = steps(good, tmp_path, 0, 2, global_batch_size=N)
    places = np.argsort(first[0]), np.argsort(second[0])
    assert not any(
        torch.equal(a, b) for a, b in zip(first[2][places[0]], second[2][places[1]], strict=True)
    )


def test_stopping_early_and_starting_in_the_middle(good, tmp_path):
    loader = train_loader(good, tmp_path)
    expected = [(batch.indices, batch.images) for batch in loader.batches(0, 10)]
    for stopped_after in (1, 2, 5):
        iterator = loader.batches(0, 10)
        for _ in itertools.islice(iterator, stopped_after):
            pass
        iterator.close()
        assert "loader" not in [
            thread.name for thread in loader_threads()
        ]  # its own; the pools stay
        continued = [(batch.indices, batch.images) for batch in loader.batches(stopped_after, 10)]
        for (rows, images), (other_rows, other_images) in zip(
            expected[stopped_after:], continued, strict=True
        ):
            assert np.array_equal(rows, other_rows)
            assert torch.equal(images, other_images)
    abandoned = loader.batches(0, 10)
    next(abandoned)
    assert np.array_equal(
        next(loader.batches(4, 5)).indices, expected[4][0]
    )  # takes the pipeline over
    assert list(loader.batches(3, 3)) == []
    loader.close()
    assert not loader_threads()


@pytest.mark.slow
def test_bad_files_are_replaced_the_same_way_on_every_layout(mixed, tmp_path):
    """Each by the next good file, with its label; everything else as if nothing had happened."""
    one = steps(mixed, tmp_path / "one", 0, 10)
    two = steps(mixed, tmp_path / "two", 0, 10, world_size=2, grad_accum_steps=2)
    assert_same(one, two)
    clean = train_loader(mixed, tmp_path)
    wanted = [job.rows for job in clean.jobs(0, 10)]
    clean.close()
    for (rows, labels, images), asked in zip(one, wanted, strict=True):
        assert rows.tolist() == [REPLACED.get(row, row) for row in asked.tolist()]
        assert np.array_equal(labels, mixed.labels_of(rows))
        assert torch.isfinite(images).all()
    lines = [
        json.loads(line)
        for line in (tmp_path / "one" / "quarantine.jsonl").read_text().splitlines()
    ]
    seen = {row for rows in wanted for row in rows.tolist()}
    assert sorted(line["path"] for line in lines) == sorted(
        mixed.path(row) for row in REPLACED if row in seen
    )
    assert any("the decoder refuses it" in line["reason"] for line in lines)


def test_mixed_batch_leaves_the_good_images_alone(good, mixed, tmp_path):
    """The crops of good images are those that they have in a clean set."""
    dirty = steps(mixed, tmp_path, 0, 5)
    clean = steps(good, tmp_path, 0, 5)
    for (rows, _, images), (asked, _, expected) in zip(dirty, clean, strict=True):
        same = (rows == asked) & (asked != 5)
        assert torch.equal(images[same], expected[same])


def test_limit_of_bad_files_stops_the_run(mixed, tmp_path):
    loader = train_loader(mixed, tmp_path, max_bad_images=3)
    with pytest.raises(
        ValueError, match="4 broken train images.*data.max_bad_images = 3.*quarantine.jsonl"
    ):
        list(loader.batches(0, 10))
    assert loader.num_bad == 4
    loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_every_image_once(mixed, tmp_path, world_size):
    """Bad ones too, black and without a label; the same pixels on any number of ranks, again and
    again.
    """
    expected = {}
    for rank in range(world_size):
        loader = val_loader(
            mixed,
            tmp_path,
            rank=rank,
            world_size=world_size,
            val_batch_size=7,
            val_resize_size=36,
            val_crop_size=32,
        )
        for repeat in range(2):
            items = list(loader)
            assert len(items) == loader.rounds
            for batch in filter(None, items):
                for row, label, image in zip(
                    batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True
                ):
                    assert label == (IGNORED_LABEL if row in REPLACED else mixed.labels_of(row))
                    assert (row in expected) == (repeat == 1)
                    assert row not in REPLACED or (image.amax((1, 2)) == image.amin((1, 2))).all()
                    assert torch.equal(expected.setdefault(row, image), image)
        loader.close()
    assert sorted(expected) == list(range(N))


def test_validation_that_is_left_early_starts_again(good, tmp_path):
    loader = val_loader(good, tmp_path, val_batch_size=5, val_resize_size=36, val_crop_size=32)
    first = next(iter(loader))
    assert np.array_equal(next(iter(loader)).indices, first.indices)
    assert sum(len(batch.labels) for batch in loader) == N
    loader.close()


def test_an_error_in_the_background_is_raised_in_front(good, tmp_path, monkeypatch):
    loader = train_loader(good, tmp_path)
    monkeypatch.setattr(decoding, "job_geometry", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.batches(0, 5))
    monkeypatch.undo()
    assert len(list(loader.batches(0, 2))) == 2  # and the loader is as good as new
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
    assert len(made) <= 1 + 2 + 1 + 2  # taken, in the queue, waiting for the queue, in the decoder
    iterator.close()
    loader.close()


def test_shards_are_the_folder_bit_for_bit(mixed, tmp_path):
    """Packed in any order, bad files with it: rows, labels and pixels are the same, so a run may
    move.
    """
    there = [row for row in range(N) if os.path.exists(mixed.path(row))]
    write_split(tmp_path / "copy", [Path(mixed.path(row)).read_bytes() for row in there])
    folder = build_index(str(tmp_path / "copy"), "train", OneProcess())
    pack_shards(
        folder,
        tmp_path / "shards" / "train",
        np.random.default_rng(0).permutation(len(there)),
        shards=4,
    )
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
    (batch,) = train.batches(0, 1)
    assert sorted(train.index.name(row) for row in batch.indices.tolist()) == sorted(
        f"class{i // 4}/{i:04d}.jpg" for i in range(12) if i not in (1, 11)
    )
    assert [train.index.name(row).split("/")[0] for row in batch.indices.tolist()] == [
        f"class{label}" for label in batch.labels.tolist()
    ]
    train.close()
    val.close()


@pytest.mark.slow
def test_build(tmp_path):
    """Each kind of data gives loaders that agree on the classes and deliver."""
    good = {
        split: write_split(tmp_path / "folder", GOOD[:12], split=split)
        for split in ("train", "val")
    }
    sizes = {"train_crop_size": 32, "val_resize_size": 32, "val_crop_size": 32, "val_batch_size": 5}
    for kind, count in (("folder", len(good["train"])), ("digits", 1442), ("synthetic", 1280)):
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
    assert calls == [("wait", "event"), *((name, stream) for name in ("images", "labels", "view"))]
