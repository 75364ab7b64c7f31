"""Tar shards: what is in them, that others read them, and that a run on them is a run on the
folder.
"""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import OneProcess, encode, picture, train_loader
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
    for name, data in FILES.items():
        path = tmp_path / "source" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "source"


def pack(source, out, *options):
    return main(["data", "pack", str(source), str(out), *options])


def members(folder):
    """{name: bytes} of all shards, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})
    return found


def open_index(folder):
    return build_index(str(folder), "train", OneProcess())


def test_a_run_on_shards_is_a_run_on_the_folder(source, tmp_path):
    assert pack(source, tmp_path / "out", "--workers", "2") == 0
    ours = open_index(source)
    theirs = open_index(tmp_path / "out")
    assert theirs.shards == ("train-000000.tar",)
    assert theirs.fingerprint() == ours.fingerprint()
    assert theirs.class_names == ours.class_names == ("a.cat", "b", "ü")
    rows = np.arange(len(FILES))
    assert [theirs.name(row) for row in rows] == [ours.name(row) for row in rows] == sorted(FILES)
    assert [load(theirs, row).data for row in rows] == [FILES[ours.name(row)] for row in rows]
    loaders = [train_loader(index, tmp_path) for index in (ours, theirs)]
    for one, other in zip(*(list(loader.batches(0, 3)) for loader in loaders), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.indices.tolist() == other.indices.tolist()
    for loader in loaders:
        loader.close()


def test_samples_in_the_tar(source, tmp_path):
    assert pack(source, tmp_path / "out") == 0
    found = list(members(tmp_path / "out" / "train").items())
    assert {name for name, _ in found[::2]} >= {
        "a.cat/x.jpeg",
        "a.cat/x_.png",
        "a.cat/x_y.jpg",
        "a.cat/x_y_.jpg",
        "b/5.jpg",
    }
    labels = {"a.cat": b"0", "b": b"1", "ü": b"2"}
    for (image, _), (label, content) in zip(found[::2], found[1::2], strict=True):
        assert label == f"{os.path.splitext(image)[0]}.cls"
        assert content == labels[os.path.dirname(image)]
    assert sorted(data for _, data in found[::2]) == sorted(FILES.values())
    assert [name for name, _ in found] != sorted(name for name, _ in found)


def test_dali_reads_the_shards(source, tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    assert pack(source, tmp_path / "out") == 0
    pipeline = dali.Pipeline(batch_size=len(FILES), num_threads=1, device_id=None)
    with pipeline:
        images, labels = dali.fn.readers.webdataset(
            paths=[str(tmp_path / "out/train/train-000000.tar")],
            ext=["jpg;jpeg;png", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(images, labels)
    images, labels = pipeline.run()
    expected = list(members(tmp_path / "out" / "train").values())
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
    assert resized == {"a.cat/x_y.jpg", *(f"b/{i}.JPG" for i in range(5, 12) if 50 + 5 * i > 60)}


def test_quality_encodes_all_that_it_makes_smaller(source, tmp_path):
    """At the same size; what would grow, or cannot be decoded, keeps its bytes."""
    assert pack(source, tmp_path / "out", "--quality", "50") == 0
    index = open_index(tmp_path / "out")
    smaller = 0
    for row in range(len(index)):
        data = load(index, row).data
        original = (source / "train" / index.name(row)).read_bytes()
        assert len(data) <= len(original)
        if data != original:
            smaller += 1
            assert Image.open(io.BytesIO(data)).size == Image.open(io.BytesIO(original)).size
    assert smaller > len(index) // 2


def killed(function, count, *arguments):
    """Run `function` in a process that gets SIGKILL at its `count`-th flush to the disk or
    rename.
    """

    def counted(original, calls):
        def call(*args):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    def body():
        calls = []
        os.fsync = counted(os.fsync, calls)
        os.replace = counted(os.replace, calls)
        function(*arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


# Before the second shard is complete; between its sidecar and it. Each small file takes three
# calls, the index of the source and the plan come first.
@pytest.mark.parametrize("count", [12, 16])
def test_a_killed_pack_goes_on(source, tmp_path, count):
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (400, 400, 3), np.uint8)).save(
            source / f"train/b/large{i}.png"
        )
    options = ("--shard_mb", "1", "--workers", "1")
    assert pack(source, tmp_path / "whole", *options) == 0
    killed(pack, count, source, tmp_path / "out", *options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train").glob("*.tar")}
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole/train").iterdir()}
    assert 0 < len(before) < len([name for name in expected if name.endswith(".tar")])
    assert not (tmp_path / "out/train/index.bin").exists()
    assert pack(source, tmp_path / "out", *options) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {name: (tmp_path / "out/train" / name).read_bytes() for name in expected} == expected


def test_what_is_not_all_there_is_no_data_set(source, tmp_path):
    """A shard that was not copied, or not written before a kill: an error, not a smaller data
    set.
    """
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (400, 400, 3), np.uint8)).save(
            source / f"train/b/large{i}.png"
        )
    assert pack(source, tmp_path / "out", "--shard_mb", "1") == 0
    sorted((tmp_path / "out/train").glob("*.tar"))[-1].unlink()
    with pytest.raises(
        ValueError, match=r"train/ has \d of \d shards: run `resnet-dist data pack` again"
    ):
        open_index(tmp_path / "out")


def test_shards_of_something_else_are_not_mixed(source, tmp_path, capsys):
    assert pack(source, tmp_path / "out") == 0
    assert pack(source, tmp_path / "out", "--resize", "30") == 2
    assert "repeat the arguments" in capsys.readouterr().err
    os.unlink(source / "train/b/cut.jpg")
    assert pack(source, tmp_path / "out") == 2
    assert json.loads(Path(tmp_path, "out/train/.pack.json").read_text())["resize"] == 0
