"""Tar shards: what is in them, that others read them, and that a run on them is a run on the
folder.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    contents,
    members_of_shards,
    modification_times,
    run_and_kill,
    write_tree,
)
from image_files import (
    assert_same_batches,
    encode,
    open_image,
    open_split,
    picture,
    train_loader,
)
from nvidia.dali import Pipeline, fn
from PIL import Image

from resnet_dist.cli import main
from resnet_dist.data.pixels.read import load

NUMBERED = {f"b/{i}.JPG": encode(picture(50 + 5 * i, 70, i)) for i in range(5, 12)}
FILES = {
    "a.cat/x.JPEG": encode(picture(60, 80, 1)),
    "a.cat/x.png": encode(picture(40, 40, 2), "PNG"),
    "a.cat/x.y.jpg": encode(picture(90, 50, 3)),
    "a.cat/x_y.jpg": encode(picture(64, 64, 4)),
    "b/cut.jpg": b"\xff\xd8 cut",
    **NUMBERED,
    "ü/1.jpeg": encode(picture(33, 99, 30)),
}


@pytest.fixture
def source(tmp_path):
    write_tree(tmp_path / "source" / "train", FILES)
    return tmp_path / "source"


def pack(source, out, *options):
    return main(["data", "pack", str(source), str(out), *options])


def test_a_run_on_shards_is_a_run_on_the_folder(source, tmp_path):
    assert pack(source, tmp_path / "out", "--workers", "2") == 0
    of_folder = open_split(source)
    of_shards = open_split(tmp_path / "out")
    assert of_shards.shards == ("train-000000.tar",)
    assert of_shards.fingerprint() == of_folder.fingerprint()
    assert of_shards.class_names == of_folder.class_names == ("a.cat", "b", "ü")
    names = [of_folder.name(row) for row in range(len(FILES))]
    assert names == sorted(FILES)
    for row, name in enumerate(names):
        assert of_shards.name(row) == name
        image = load(of_shards, row)
        assert image.data == FILES[name]

    batches = three_batches(of_shards, tmp_path)
    assert_same_batches(batches, three_batches(of_folder, tmp_path))


def three_batches(index, folder):
    """The first batches of a training, which stay valid after the loader is closed."""
    loader = train_loader(index, folder)
    batches = list(loader.batches(0, 3))
    loader.close()
    return batches


def test_samples_in_the_tar(source, tmp_path):
    """An image and its class id, in an order that is not sorted. Names have one dot, as
    webdataset's keys must, and stay different.
    """
    assert pack(source, tmp_path / "out") == 0
    members = members_of_shards(tmp_path / "out" / "train")
    names = list(members)
    image_names = names[::2]
    label_names = names[1::2]
    assert names != sorted(names)
    assert set(image_names) >= {
        "a.cat/x.jpeg",
        "a.cat/x_.png",
        "a.cat/x_y.jpg",
        "a.cat/x_y_.jpg",
        "b/5.jpg",
    }
    class_ids = {"a.cat": b"0", "b": b"1", "ü": b"2"}
    for image_name, label_name in zip(image_names, label_names, strict=True):
        stem, _ = os.path.splitext(image_name)
        assert label_name == f"{stem}.cls"
        folder = os.path.dirname(image_name)
        assert members[label_name] == class_ids[folder]
    images = [members[name] for name in image_names]
    assert sorted(images) == sorted(FILES.values())


def test_dali_reads_the_shards(source, tmp_path):
    assert pack(source, tmp_path / "out") == 0
    pipeline = Pipeline(batch_size=len(FILES), num_threads=1, device_id=None)
    with pipeline:
        images, labels = fn.readers.webdataset(
            paths=[str(tmp_path / "out/train/train-000000.tar")],
            ext=["jpg;jpeg;png", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(images, labels)
    images, labels = pipeline.run()
    image_bytes = [np.asarray(image).tobytes() for image in images]
    label_bytes = [np.asarray(label).tobytes() for label in labels]

    # An image and its label in turn.
    members = members_of_shards(tmp_path / "out" / "train")
    contents_of_members = list(members.values())
    assert image_bytes == contents_of_members[::2]
    assert label_bytes == contents_of_members[1::2]


def test_resize_brings_large_images_down_and_leaves_the_others(source, tmp_path, capsys):
    pixels_of_16_bits = np.full((70, 90), 40000, np.uint16)
    Image.fromarray(pixels_of_16_bits).save(source / "train/b/deep.png")
    assert pack(source, tmp_path / "out", "--resize", "60") == 0
    said = capsys.readouterr().out
    assert "kept as it was: train/b/cut.jpg: " in said
    assert "kept as it was: train/b/deep.png: it has 16 bits" in said

    index = open_split(tmp_path / "out")
    resized = set()
    for row in range(len(index)):
        data = load(index, row).data
        name = index.name(row)
        original = (source / "train" / name).read_bytes()
        if data == original:
            continue
        resized.add(name)
        image = open_image(data)
        before = open_image(original)
        assert image.format == "JPEG"
        assert min(image.size) == 60 < min(before.size)
        expected = before.resize(image.size, Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(image) - np.asarray(expected).astype(int))
        assert difference.mean() < 8
    # Of FILES, those whose shorter side has more than 60 pixels.
    assert resized == {"a.cat/x_y.jpg", *NUMBERED}


def test_quality_encodes_all_that_it_makes_smaller(source, tmp_path):
    """At the same size; what would grow, or cannot be decoded, keeps its bytes."""
    assert pack(source, tmp_path / "out", "--quality", "50") == 0
    index = open_split(tmp_path / "out")
    num_smaller = 0
    for row in range(len(index)):
        data = load(index, row).data
        original = (source / "train" / index.name(row)).read_bytes()
        if data == original:
            continue
        num_smaller += 1
        assert len(data) < len(original)
        assert open_image(data).size == open_image(original).size
    assert num_smaller > len(index) // 2


def add_large_images(source, count):
    """Noise, which PNG does not compress: half a megabyte each."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(noise).save(source / f"train/b/large{seed}.png")


# Before the second shard is complete; between its sidecar and it. Each small file takes three
# calls, the index of the source and the plan come first.
@pytest.mark.parametrize("count", [12, 16])
def test_a_killed_pack_goes_on(source, tmp_path, count):
    add_large_images(source, 6)
    options = ("--shard_mb", "1", "--workers", "1")
    assert pack(source, tmp_path / "whole", *options) == 0
    expected = contents(tmp_path / "whole/train")
    all_shards = [name for name in expected if name.endswith(".tar")]
    out = tmp_path / "out/train"

    run_and_kill(pack, count, source, tmp_path / "out", *options)

    finished = [path.name for path in out.glob("*.tar")]
    times = modification_times(out, finished)
    assert 0 < len(finished) < len(all_shards)
    assert not (out / "index.bin").exists()
    assert pack(source, tmp_path / "out", *options) == 0
    assert modification_times(out, finished) == times, "not written again"
    assert contents(out) == expected


def test_what_is_not_all_there_is_no_data_set(source, tmp_path):
    """A shard that was not copied, or not written before a kill: an error, not a smaller data
    set.
    """
    add_large_images(source, 3)
    assert pack(source, tmp_path / "out", "--shard_mb", "1") == 0
    last_shard = max((tmp_path / "out/train").glob("*.tar"))
    last_shard.unlink()
    message = r"train/ has \d of \d shards: run `resnet-dist data pack` again"
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path / "out")


def test_shards_of_something_else_are_not_mixed(source, tmp_path, capsys):
    assert pack(source, tmp_path / "out") == 0
    assert pack(source, tmp_path / "out", "--resize", "30") == 2
    assert "repeat the arguments" in capsys.readouterr().err
    os.unlink(source / "train/b/cut.jpg")
    assert pack(source, tmp_path / "out") == 2
    text = Path(tmp_path, "out/train/.pack.json").read_text()
    assert json.loads(text)["resize"] == 0
