"""Tar shards: what is in them, that others read them, and that a run on them is a run on the
folder.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    contents,
    members_of_shards,
    modification_times,
    run_and_kill,
    write_tree,
)
from image_files import OneProcess, encode, picture, train_loader
from nvidia.dali import Pipeline, fn
from PIL import Image

from resnet_dist.cli import main
from resnet_dist.data.pixels.read import load
from resnet_dist.data.sources.scan import build_index

FILES = {
    "a.cat/x.JPEG": encode(picture(60, 80, 1)),
    "a.cat/x.png": encode(picture(40, 40, 2), "PNG"),
    "a.cat/x.y.jpg": encode(picture(90, 50, 3)),
    "a.cat/x_y.jpg": encode(picture(64, 64, 4)),
    "b/cut.jpg": b"\xff\xd8 cut",
    **{f"b/{i}.JPG": encode(picture(50 + 5 * i, 70, i)) for i in range(5, 12)},
    "ü/1.jpeg": encode(picture(33, 99, 30)),
}


@pytest.fixture
def source(tmp_path):
    write_tree(tmp_path / "source" / "train", FILES)
    return tmp_path / "source"


def pack(source, out, *options):
    return main(["data", "pack", str(source), str(out), *options])


def open_index(folder):
    return build_index(str(folder), "train", OneProcess())


def test_a_run_on_shards_is_a_run_on_the_folder(source, tmp_path):
    assert pack(source, tmp_path / "out", "--workers", "2") == 0
    ours = open_index(source)
    theirs = open_index(tmp_path / "out")
    assert theirs.shards == ("train-000000.tar",)
    assert theirs.fingerprint() == ours.fingerprint()
    assert theirs.class_names == ours.class_names == ("a.cat", "b", "ü")
    names = [ours.name(row) for row in range(len(FILES))]
    assert names == sorted(FILES)
    for row, name in enumerate(names):
        assert theirs.name(row) == name
        assert load(theirs, row).data == FILES[name]

    our_loader = train_loader(ours, tmp_path)
    their_loader = train_loader(theirs, tmp_path)
    our_batches = list(our_loader.batches(0, 3))
    their_batches = list(their_loader.batches(0, 3))
    our_loader.close()
    their_loader.close()
    for one, other in zip(our_batches, their_batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.indices.tolist() == other.indices.tolist()


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
        assert label_name == f"{os.path.splitext(image_name)[0]}.cls"
        assert members[label_name] == class_ids[os.path.dirname(image_name)]
    assert sorted(members[name] for name in image_names) == sorted(FILES.values())


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
    expected = list(members_of_shards(tmp_path / "out" / "train").values())
    assert [np.asarray(image).tobytes() for image in images] == expected[::2]
    assert [np.asarray(label).tobytes() for label in labels] == expected[1::2]


def test_resize_brings_large_images_down_and_leaves_the_others(source, tmp_path, capsys):
    Image.fromarray(np.full((70, 90), 40000, np.uint16)).save(source / "train/b/deep.png")
    assert pack(source, tmp_path / "out", "--resize", "60") == 0
    said = capsys.readouterr().out
    assert "kept as it was: train/b/cut.jpg: " in said
    assert "kept as it was: train/b/deep.png: it has 16 bits" in said

    index = open_index(tmp_path / "out")
    resized = set()
    for row in range(len(index)):
        data = load(index, row).data
        name = index.name(row)
        original = (source / "train" / name).read_bytes()
        if data == original:
            continue
        resized.add(name)
        image = Image.open(io.BytesIO(data))
        before = Image.open(io.BytesIO(original))
        assert image.format == "JPEG"
        assert min(image.size) == 60 < min(before.size)
        expected = np.asarray(before.resize(image.size, Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(image) - expected).mean() < 8
    # Of FILES, those whose shorter side has more than 60 pixels.
    assert resized == {"a.cat/x_y.jpg", *(f"b/{i}.JPG" for i in range(5, 12))}


def test_quality_encodes_all_that_it_makes_smaller(source, tmp_path):
    """At the same size; what would grow, or cannot be decoded, keeps its bytes."""
    assert pack(source, tmp_path / "out", "--quality", "50") == 0
    index = open_index(tmp_path / "out")
    num_smaller = 0
    for row in range(len(index)):
        data = load(index, row).data
        original = (source / "train" / index.name(row)).read_bytes()
        if data == original:
            continue
        num_smaller += 1
        assert len(data) < len(original)
        assert Image.open(io.BytesIO(data)).size == Image.open(io.BytesIO(original)).size
    assert num_smaller > len(index) // 2


def add_large_images(source, count):
    """Noise, which PNG does not compress: half a megabyte each."""
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(noise).save(source / f"train/b/large{i}.png")


# Before the second shard is complete; between its sidecar and it. Each small file takes three
# calls, the index of the source and the plan come first.
@pytest.mark.parametrize("count", [12, 16])
def test_a_killed_pack_goes_on(source, tmp_path, count):
    add_large_images(source, 6)
    options = ("--shard_mb", "1", "--workers", "1")
    assert pack(source, tmp_path / "whole", *options) == 0
    expected = contents(tmp_path / "whole/train")
    out = tmp_path / "out/train"

    run_and_kill(pack, count, source, tmp_path / "out", *options)

    finished = [path.name for path in out.glob("*.tar")]
    times = modification_times(out, finished)
    assert 0 < len(finished) < len([name for name in expected if name.endswith(".tar")])
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
        open_index(tmp_path / "out")


def test_shards_of_something_else_are_not_mixed(source, tmp_path, capsys):
    assert pack(source, tmp_path / "out") == 0
    assert pack(source, tmp_path / "out", "--resize", "30") == 2
    assert "repeat the arguments" in capsys.readouterr().err
    os.unlink(source / "train/b/cut.jpg")
    assert pack(source, tmp_path / "out") == 2
    assert json.loads(Path(tmp_path, "out/train/.pack.json").read_text())["resize"] == 0
