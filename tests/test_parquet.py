"""Parquet files as `datasets` writes them: import, restart, bad files, evaluation."""

import contextlib
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import members_of_shards, modification_times, run_and_kill
from dist_utils import run_command
from image_files import OneProcess, encode, picture, val_loader

from resnet_dist.cli import main
from resnet_dist.data.pixels.read import load
from resnet_dist.data.sources.parquet import ParquetOptions, find_parquet_files, open_parquet
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.sources.val_index import build_val_index, is_parquet

CLASSES = ["b", "a", "c/d"]
"""In an order that is not theirs as folders, one with a slash."""
FOLDERS = ["b", "a", "c_d"]
datasets.disable_progress_bars()


def image_bytes(number):
    return encode(picture(20, 24 + number % 5, number))


def rows_of(first, count):
    """Images and labels; two images of a class have the same file name, and one has none."""
    rows = []
    for number in range(first, first + count):
        path = f"{number}.JPEG"
        if number == 7:
            path = "4.JPEG"
        if number == 11:
            path = None
        rows.append({"image": {"bytes": image_bytes(number), "path": path}, "label": number % 3})
    return rows


def write_parquet(path, rows, classes=CLASSES, compression="snappy"):
    """By `datasets` itself, in groups of 100 rows.

    Its present version does not compress columns of images. The files on the hub have snappy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    columns = {key: [row[key] for row in rows] for key in ("image", "label")}
    data = datasets.Dataset.from_dict(columns, features=features)
    data.to_parquet(str(path), batch_size=100)
    if compression:
        table = pq.read_table(path)
        pq.write_table(table, path, compression=compression, row_group_size=100)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """As a clone of the hub: 370 training images in two files, 130 for validation."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder / "data/train-00000-of-00002.parquet", rows_of(0, 250))
    write_parquet(folder / "data/train-00001-of-00002.parquet", rows_of(250, 120))
    write_parquet(
        folder / "data/validation-00000-of-00001.parquet", rows_of(1000, 130), compression=None
    )
    return folder


def run_import(source, out, *options):
    return main(["data", "import-parquet", str(source), str(out), *options])


def open_split(folder, split="train"):
    return build_index(str(folder), split, OneProcess())


def contents_of(index):
    """{name: (class name, bytes)}"""
    found = {}
    for row in range(len(index)):
        label = int(index.labels_of(np.array([row]))[0])
        found[index.name(row)] = (index.class_names[label], load(index, row).data)
    return found


def expected_name(number):
    special = {7: "00000007_4.JPEG", 11: "00000011.jpg"}
    return f"{FOLDERS[number % 3]}/{special.get(number, f'{number}.JPEG')}"


def test_import_is_what_pack_makes_of_the_same_folders(source, tmp_path, capsys):
    file = pq.ParquetFile(source / "data/train-00000-of-00002.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [100, 100, 50]
    assert file.metadata.row_group(0).column(0).compression == "SNAPPY"
    assert run_import(source, tmp_path / "out") == 0
    assert "train: 370 images of 3 classes in 1 shards" in capsys.readouterr().out
    for number in range(370):
        path = tmp_path / "folders/train" / expected_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    assert main(["data", "pack", str(tmp_path / "folders"), str(tmp_path / "packed")]) == 0
    ours = open_split(tmp_path / "out")
    packed = open_split(tmp_path / "packed")
    assert ours.class_names == packed.class_names == ("a", "b", "c_d")
    assert ours.fingerprint() == packed.fingerprint()
    assert contents_of(ours) == contents_of(packed)
    assert len(contents_of(open_split(tmp_path / "out", "val"))) == 130
    (tmp_path / "out/train/index.bin").unlink()
    assert open_split(tmp_path / "out").class_names == ours.class_names


# Each shard is synced and renamed, and so is the file beside it. Plan and index are the first and
# the last file.
@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 6, 9, 12])
def test_a_killed_import_goes_on(tmp_path, count):
    rows = rows_of(0, 230)
    for number in (3, 150):
        rows[number]["image"]["bytes"] = encode(picture(900, 900, number), quality=99)
    write_parquet(tmp_path / "data/train-0.parquet", rows)
    options = ("--shard_mb", "1", "--workers", "1")
    assert run_import(tmp_path, tmp_path / "whole", *options) == 0
    expected = members_of_shards(tmp_path / "whole/train")
    run_and_kill(run_import, count, tmp_path, tmp_path / "out", *options)
    finished = list((tmp_path / "out/train").glob("*.tar"))
    times = modification_times(tmp_path / "out", finished)
    assert not (tmp_path / "out/train/index.bin").exists()
    assert run_import(tmp_path, tmp_path / "out", *options) == 0
    assert modification_times(tmp_path / "out", finished) == times, "not written again"
    assert list(members_of_shards(tmp_path / "out/train").items()) == list(expected.items())
    assert len(expected) == 2 * 230
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 2


def plain_table(count, **columns):
    images = [{"bytes": image_bytes(number), "path": f"{number}.jpg"} for number in range(count)]
    return pa.table({"image": images, "label": [0] * count, **columns})


def test_bad_files_are_one_sentence(source, tmp_path, capsys):
    """With the file, the row group and a way out; exit code 2, and nothing is written."""
    good = (source / "data/train-00000-of-00002.parquet").read_bytes()
    damaged = bytearray(good)
    group = pq.ParquetFile(source / "data/train-00000-of-00002.parquet").metadata.row_group(1)
    place = group.column(1).data_page_offset + 30
    damaged[place : place + 40] = b"\xff" * 40
    no_bytes = [{"bytes": None, "path": "/a.jpg"}]

    def named(**metadata):
        return {b"huggingface": json.dumps({"info": {"features": metadata}}).encode()}

    two = {"_type": "ClassLabel", "names": ["x", "y"]}
    cases = {
        "cut": (good[:-100], "is no complete parquet file", "download the file again"),
        "damaged": (bytes(damaged), "row group 1: it is damaged", "download the file again"),
        "empty": (b"", "is no complete parquet file", "download"),
        "names": (plain_table(2), "does not say the names of its classes", "--class_names FILE"),
        "columns": (pa.table({"x": [1]}), "has no column image, only x", "--image_column NAME"),
        "kind": (pa.table({"image": [b"x"], "label": [0]}), "the column image is binary", "save"),
        "text": (plain_table(1).set_column(1, "label", [["a"]]), "is string", "--label_column"),
        "two": (
            plain_table(1, other=[1]).replace_schema_metadata(named(label=two, other=two)),
            "several label columns, label, other",
            "--label_column NAME",
        ),
        "outside": (
            plain_table(2)
            .set_column(1, "label", [[0, 2]])
            .replace_schema_metadata(named(label=two)),
            "row group 0: row 1 has the label 2, and the classes are 0 to 1",
            "check which data set",
        ),
        "unlabelled": (
            plain_table(1).set_column(1, "label", [[-1]]).replace_schema_metadata(named(label=two)),
            "row 0 has the label -1",
            "not published: import another split",
        ),
        "bytes": (
            plain_table(1)
            .set_column(0, "image", [no_bytes])
            .replace_schema_metadata(named(label=two)),
            "row group 0: an image has no bytes",
            "embed_external_files",
        ),
    }
    for name, (content, problem, way_out) in cases.items():
        path = tmp_path / name / "train-0.parquet"
        path.parent.mkdir()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
        assert run_import(path.parent, tmp_path / "out" / name) == 2, name
        said = capsys.readouterr().err
        assert problem in said, said
        assert way_out in said, said
        assert str(path) in said, said
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert not list((tmp_path / "out" / name).rglob("*.tar")), name
    assert run_import(tmp_path, tmp_path / "x") == 2
    assert "holds no parquet files of a training or validation set" in capsys.readouterr().err


def test_names_of_classes_come_from_a_file_or_are_imagenets(tmp_path, capsys):
    pq.write_table(plain_table(3), tmp_path / "test-0.parquet")
    (tmp_path / "names.txt").write_text("z\ny\n")
    assert run_import(tmp_path, tmp_path / "out") == 2
    assert "--val_split test" in capsys.readouterr().err
    options = ("--class_names", str(tmp_path / "names.txt"), "--val_split", "test")
    assert run_import(tmp_path, tmp_path / "out", *options) == 0
    index = open_split(tmp_path / "out", "val")
    assert [index.name(row) for row in range(3)] == ["z/0.jpg", "z/1.jpg", "z/2.jpg"]
    from resnet_dist.checkpoints.torchvision_weights import imagenet_words
    from resnet_dist.models.class_names import imagenet_ids

    words = [f"{word}, in other words {number}" for number, word in enumerate(imagenet_words())]
    rows = rows_of(0, 1)
    write_parquet(tmp_path / "i/train-0.parquet", [{**rows[0], "label": 17}], classes=words)
    split = open_parquet(find_parquet_files(str(tmp_path / "i"), "train"), ParquetOptions())
    assert split.class_names == imagenet_ids()
    assert split.names == [f"{imagenet_ids()[17]}/0.JPEG"]


def test_damaged_images_are_kept_and_named(tmp_path, capsys):
    rows = rows_of(0, 5)
    rows[2]["image"]["bytes"] = b"no image"
    write_parquet(tmp_path / "data/train-0.parquet", rows)
    assert run_import(tmp_path, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "kept as it was: train/c_d/2.JPEG: neither JPEG nor PNG" in said
    assert len(open_split(tmp_path / "out")) == 5


def test_training_names_the_import(source):
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"resnet-dist data import-parquet {source} OUT"):
            open_split(source, split)


def test_evaluation_reads_parquet_in_place(source, tmp_path):
    """Each image once on any number of ranks, with the pixels and labels of the imported shards."""
    assert run_import(source, tmp_path / "out") == 0
    sizes = {"val_resize_size": 16, "val_crop_size": 16, "val_batch_size": 32}

    def shown(index, world_size):
        found = []
        for rank in range(world_size):
            loader = val_loader(index, tmp_path, rank=rank, world_size=world_size, **sizes)
            for batch in loader:
                if batch is None:
                    continue
                names = [index.name(row) for row in batch.indices.tolist()]
                sums = batch.images.sum((1, 2, 3)).tolist()
                found += zip(names, batch.labels.tolist(), sums, strict=True)
            loader.close()
        return sorted(found)

    in_place = build_val_index(str(source), "val", OneProcess())
    imported = build_val_index(str(tmp_path / "out"), "val", OneProcess())
    assert is_parquet(in_place)
    assert not is_parquet(imported)
    assert in_place.class_names == imported.class_names
    expected = shown(imported, 1)
    assert len(expected) == 130
    assert shown(in_place, 1) == shown(in_place, 3) == expected
    assert "validation-00000-of-00001.parquet:" in in_place.path(3)


def test_a_damaged_group_ends_an_evaluation(source, tmp_path):
    path = tmp_path / "data/validation-0.parquet"
    write_parquet(path, rows_of(0, 130))
    index = build_val_index(str(tmp_path), "val", OneProcess())
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1)
    place = group.column(0).data_page_offset
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    loader = val_loader(index, tmp_path, val_resize_size=16, val_crop_size=16)
    with pytest.raises(ValueError, match="validation-0.parquet, row group 1: it is damaged"):
        list(loader)
    loader.close()


@pytest.mark.slow
def test_the_command_evaluates_parquet(checkpoint, digits, tmp_path):
    rows = []
    for image in sorted(Path(digits, "val").glob("*/*")):
        label = int(image.parent.name)
        row = {"image": {"bytes": image.read_bytes(), "path": image.name}, "label": label}
        rows.append(row)
    classes = [str(number) for number in range(10)]
    write_parquet(tmp_path / "data/validation-0.parquet", rows[::-1], classes=classes)
    arguments = ["evaluate", "--checkpoint", checkpoint, "--json", "--distributed.threads", "1"]
    results = []
    for folder in (digits, str(tmp_path)):
        code, printed = run_command(tmp_path, [*arguments, "--data", folder])
        assert code == 0, printed
        results.append(json.loads(printed.splitlines()[-1])["model"])
    assert results[0]["num"] == len(rows)
    assert results[0]["correct1"] == results[1]["correct1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"])


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    protocol_version = "HTTP/1.1"
    commit = "1" * 40

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        server = self.server
        server.requests.append(path)
        files = {
            str(file.relative_to(server.root)): file
            for file in server.root.rglob("*")
            if file.is_file()
        }
        if path.startswith("/api/datasets/me/set"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            info = {"id": "me/set", "sha": self.commit, "siblings": siblings, "tags": []}
            if "/tree/" in path:
                info = []
                for name, file in sorted(files.items()):
                    size = file.stat().st_size
                    info.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
            return self.send(200, json.dumps(info).encode(), with_body)
        name = path.partition(f"/resolve/{self.commit}/")[2]
        if path.startswith("/datasets/me/set/") and name in files:
            return self.send(200, files[name].read_bytes(), with_body)
        return self.send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def send(self, status, body, with_body, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextlib.contextmanager
def local_hub(root):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root = Path(root)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_import_from_a_local_hub(source, tmp_path, monkeypatch, capsys):
    with local_hub(source) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert main(["data", "import-hf", "me/other", str(tmp_path / "other")]) == 2
        assert "the hub has no data set me/other" in capsys.readouterr().err
        assert main(["data", "import-hf", "me/set", str(tmp_path / "out")]) == 0
    assert len(open_split(tmp_path / "out")) == 370
    assert not (tmp_path / "out/.download").exists()
    with local_hub(source) as server:
        port = server.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    # huggingface_hub tries six times, and waits in between.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert main(["data", "import-hf", "me/set", str(tmp_path / "late")]) == 1
    assert "cannot be downloaded" in capsys.readouterr().err
