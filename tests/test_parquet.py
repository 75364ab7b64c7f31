"""Parquet files as `datasets` writes them: import, restart, bad files, evaluation."""

import contextlib
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import members_of_shards, modification_times, run_and_kill
from dist_utils import run_command
from image_files import OneProcess, encode, open_split, picture, val_loader

from resnet_dist.checkpoints.torchvision_weights import imagenet_words
from resnet_dist.cli import main
from resnet_dist.data.pixels.read import load
from resnet_dist.data.sources.parquet import ParquetOptions, find_parquet_files, open_parquet
from resnet_dist.data.sources.val_index import build_val_index, is_parquet
from resnet_dist.models.class_names import imagenet_ids

CLASSES = ["b", "a", "c/d"]
"""In an order that is not theirs as folders, one with a slash."""
FOLDERS = ["b", "a", "c_d"]
FIRST_TRAINING_FILE = "data/train-00000-of-00002.parquet"
SECOND_TRAINING_FILE = "data/train-00001-of-00002.parquet"
VALIDATION_FILE = "data/validation-00000-of-00001.parquet"
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
        image = {"bytes": image_bytes(number), "path": path}
        rows.append({"image": image, "label": number % 3})
    return rows


def write_parquet(path, rows, classes=CLASSES, compression="snappy"):
    """By `datasets` itself, in groups of 100 rows.

    Its present version does not compress columns of images. The files on the hub have snappy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=classes),
    }
    columns = {
        "image": [row["image"] for row in rows],
        "label": [row["label"] for row in rows],
    }
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    data.to_parquet(str(path), batch_size=100)
    if compression:
        table = pq.read_table(path)
        pq.write_table(table, path, compression=compression, row_group_size=100)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """As a clone of the hub: 370 training images in two files, 130 for validation."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder / FIRST_TRAINING_FILE, rows_of(0, 250))
    write_parquet(folder / SECOND_TRAINING_FILE, rows_of(250, 120))
    write_parquet(folder / VALIDATION_FILE, rows_of(1000, 130), compression=None)
    return folder


def overwrite(path, start, length):
    """Damage some bytes of a file."""
    content = bytearray(path.read_bytes())
    content[start : start + length] = b"\xff" * length
    path.write_bytes(content)


def row_group(path, number):
    """What the file says about one of its row groups."""
    return pq.ParquetFile(path).metadata.row_group(number)


def run_import(source, out, *options):
    return main(["data", "import-parquet", str(source), str(out), *options])


def contents_of(index):
    """{name: (class name, bytes)}"""
    labels = index.labels_of(np.arange(len(index)))
    found = {}
    for row, label in enumerate(labels.tolist()):
        name = index.name(row)
        image = load(index, row)
        found[name] = (index.class_names[label], image.data)
    return found


def expected_name(number):
    """The name that image `number` gets by the import."""
    file = f"{number}.JPEG"
    if number == 7:
        file = "00000007_4.JPEG"
    if number == 11:
        file = "00000011.jpg"
    folder = FOLDERS[number % 3]
    return f"{folder}/{file}"


def test_import_is_what_pack_makes_of_the_same_folders(source, tmp_path, capsys):
    groups = [row_group(source / FIRST_TRAINING_FILE, number) for number in range(3)]
    assert [group.num_rows for group in groups] == [100, 100, 50]
    assert groups[0].column(0).compression == "SNAPPY"

    assert run_import(source, tmp_path / "out") == 0
    assert "train: 370 images of 3 classes in 1 shards" in capsys.readouterr().out
    for number in range(370):
        path = tmp_path / "folders/train" / expected_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    pack = ["data", "pack", str(tmp_path / "folders"), str(tmp_path / "packed")]
    assert main(pack) == 0

    ours = open_split(tmp_path / "out")
    packed = open_split(tmp_path / "packed")
    assert ours.class_names == packed.class_names == ("a", "b", "c_d")
    assert ours.fingerprint() == packed.fingerprint()
    assert contents_of(ours) == contents_of(packed)
    val = open_split(tmp_path / "out", "val")
    assert len(contents_of(val)) == 130

    # The index is made again from the shards.
    (tmp_path / "out/train/index.bin").unlink()
    assert open_split(tmp_path / "out").class_names == ours.class_names


# Each shard is synced and renamed, and so is the file beside it. Plan and index are the first and
# the last file.
@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 6, 9, 12])
def test_a_killed_import_goes_on(tmp_path, count):
    rows = rows_of(0, 230)
    for number in (3, 150):
        large = picture(900, 900, number)
        rows[number]["image"]["bytes"] = encode(large, quality=99)
    write_parquet(tmp_path / "data/train-0.parquet", rows)
    options = ("--shard_mb", "1", "--workers", "1")
    assert run_import(tmp_path, tmp_path / "whole", *options) == 0
    expected = members_of_shards(tmp_path / "whole/train")
    assert len(expected) == 2 * 230

    run_and_kill(run_import, count, tmp_path, tmp_path / "out", *options)

    out = tmp_path / "out/train"
    finished = list(out.glob("*.tar"))
    times = modification_times(tmp_path / "out", finished)
    assert not (out / "index.bin").exists()
    assert run_import(tmp_path, tmp_path / "out", *options) == 0
    assert modification_times(tmp_path / "out", finished) == times, "not written again"
    members = members_of_shards(out)
    # In the same order too.
    assert list(members.items()) == list(expected.items())
    shards = list(out.glob("*.tar"))
    assert len(shards) == 2


def plain_table(count, **columns):
    """A table of images with the label 0, which says nothing about its columns."""
    images = []
    for number in range(count):
        image = {"bytes": image_bytes(number), "path": f"{number}.jpg"}
        images.append(image)
    return pa.table({"image": images, "label": [0] * count, **columns})


def table_with_labels(labels):
    """A table of images whose labels are of the classes x and y."""
    table = plain_table(len(labels)).set_column(1, "label", [labels])
    return with_label_columns(table, "label")


def with_label_columns(table, *names):
    """The table, whose metadata says that the columns hold labels of the classes x and y."""
    two_classes = {"_type": "ClassLabel", "names": ["x", "y"]}
    features = dict.fromkeys(names, two_classes)
    metadata = {"info": {"features": features}}
    return table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})


class BadFile(NamedTuple):
    """A parquet file that is refused, and parts of the sentence that refuses it."""

    content: bytes | pa.Table
    problem: str
    way_out: str

    def write(self, path):
        path.parent.mkdir()
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            pq.write_table(self.content, path)


def bad_files(good, damaged):
    """The cases by name. `good` and `damaged` are the contents of two parquet files."""
    no_bytes = {"bytes": None, "path": "/a.jpg"}
    text_label = plain_table(1).set_column(1, "label", [["a"]])
    two_labels = plain_table(1, other=[1])
    image_without_bytes = table_with_labels([0]).set_column(0, "image", [[no_bytes]])
    return {
        "cut": BadFile(
            good[:-100],
            "is no complete parquet file",
            "download the file again",
        ),
        "damaged": BadFile(
            damaged,
            "row group 1: it is damaged",
            "download the file again",
        ),
        "empty": BadFile(
            b"",
            "is no complete parquet file",
            "download",
        ),
        "names": BadFile(
            plain_table(2),
            "does not say the names of its classes",
            "--class_names FILE",
        ),
        "columns": BadFile(
            pa.table({"x": [1]}),
            "has no column image, only x",
            "--image_column NAME",
        ),
        "kind": BadFile(
            pa.table({"image": [b"x"], "label": [0]}),
            "the column image is binary",
            "save",
        ),
        "text": BadFile(
            text_label,
            "is string",
            "--label_column",
        ),
        "two": BadFile(
            with_label_columns(two_labels, "label", "other"),
            "several label columns, label, other",
            "--label_column NAME",
        ),
        "outside": BadFile(
            table_with_labels([0, 2]),
            "row group 0: row 1 has the label 2, and the classes are 0 to 1",
            "check which data set",
        ),
        "unlabelled": BadFile(
            table_with_labels([-1]),
            "row 0 has the label -1",
            "not published: import another split",
        ),
        "bytes": BadFile(
            image_without_bytes,
            "row group 0: an image has no bytes",
            "embed_external_files",
        ),
    }


def test_bad_files_are_one_sentence(source, tmp_path, capsys):
    """With the file, the row group and a way out; exit code 2, and nothing is written."""
    good = (source / FIRST_TRAINING_FILE).read_bytes()
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(good)
    labels = row_group(damaged, 1).column(1)
    overwrite(damaged, labels.data_page_offset + 30, 40)

    folder = tmp_path / "bad"
    folder.mkdir()
    for name, bad_file in bad_files(good, damaged.read_bytes()).items():
        path = folder / name / "train-0.parquet"
        bad_file.write(path)
        out = tmp_path / "out" / name
        assert run_import(path.parent, out) == 2, name
        said = capsys.readouterr().err
        assert bad_file.problem in said, said
        assert bad_file.way_out in said, said
        assert str(path) in said, said
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert not list(out.rglob("*.tar")), name

    assert run_import(folder, tmp_path / "x") == 2
    assert "holds no parquet files of a training or validation set" in capsys.readouterr().err


def test_names_of_classes_come_from_a_file_or_are_imagenets(tmp_path, capsys):
    # From a file.
    pq.write_table(plain_table(3), tmp_path / "test-0.parquet")
    names_file = tmp_path / "names.txt"
    names_file.write_text("z\ny\n")
    assert run_import(tmp_path, tmp_path / "out") == 2
    assert "--val_split test" in capsys.readouterr().err
    options = ("--class_names", str(names_file), "--val_split", "test")
    assert run_import(tmp_path, tmp_path / "out", *options) == 0
    index = open_split(tmp_path / "out", "val")
    names = [index.name(row) for row in range(3)]
    assert names == ["z/0.jpg", "z/1.jpg", "z/2.jpg"]

    # ImageNet's are known by their first words.
    words = []
    for number, word in enumerate(imagenet_words()):
        words.append(f"{word}, in other words {number}")
    (row,) = rows_of(0, 1)
    row["label"] = 17
    write_parquet(tmp_path / "imagenet/train-0.parquet", [row], classes=words)
    files = find_parquet_files(str(tmp_path / "imagenet"), "train")
    split = open_parquet(files, ParquetOptions())
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

    def shown(index, world_size):
        """What all ranks show together: sorted tuples of name, label and sum of the pixels."""
        found = []
        for rank in range(world_size):
            found += shown_by_rank(index, rank, world_size)
        return sorted(found)

    def shown_by_rank(index, rank, world_size):
        found = []
        loader = val_loader(
            index,
            tmp_path,
            rank=rank,
            world_size=world_size,
            val_resize_size=16,
            val_crop_size=16,
            val_batch_size=32,
        )
        for batch in loader:
            if batch is None:
                continue
            names = [index.name(row) for row in batch.indices.tolist()]
            labels = batch.labels.tolist()
            sums = batch.images.sum((1, 2, 3)).tolist()
            found += zip(names, labels, sums, strict=True)
        loader.close()
        return found

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
    images = row_group(path, 1).column(0)
    overwrite(path, images.data_page_offset, 20)
    loader = val_loader(index, tmp_path, val_resize_size=16, val_crop_size=16)
    with pytest.raises(ValueError, match="validation-0.parquet, row group 1: it is damaged"):
        list(loader)
    loader.close()


@pytest.mark.slow
def test_the_command_evaluates_parquet(checkpoint, digits, tmp_path):
    rows = []
    for path in sorted(Path(digits, "val").glob("*/*")):
        image = {"bytes": path.read_bytes(), "path": path.name}
        label = int(path.parent.name)
        rows.append({"image": image, "label": label})
    # In another order than the folders.
    rows.reverse()
    classes = [str(number) for number in range(10)]
    write_parquet(tmp_path / "data/validation-0.parquet", rows, classes=classes)

    def evaluate(folder):
        arguments = ["evaluate", "--checkpoint", checkpoint, "--data", folder]
        arguments += ["--json", "--distributed.threads", "1"]
        code, printed = run_command(tmp_path, arguments)
        assert code == 0, printed
        last_line = printed.splitlines()[-1]
        return json.loads(last_line)["model"]

    of_folders = evaluate(digits)
    of_parquet = evaluate(str(tmp_path))
    assert of_folders["num"] == len(rows)
    assert of_folders["correct1"] == of_parquet["correct1"]
    assert of_folders["loss"] == pytest.approx(of_parquet["loss"])


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
        path, _, _ = self.path.partition("?")
        self.server.requests.append(path)
        files = self.files()
        if path.startswith("/api/datasets/me/set"):
            about = tree_of(files) if "/tree/" in path else self.info_of(files)
            self.send(200, json.dumps(about).encode(), with_body)
            return
        _, _, name = path.partition(f"/resolve/{self.commit}/")
        if path.startswith("/datasets/me/set/") and name in files:
            self.send(200, files[name].read_bytes(), with_body)
            return
        self.send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def files(self):
        """{name: path} of the files of the data set, sorted by name."""
        found = {}
        for path in self.server.root.rglob("*"):
            if path.is_file():
                name = str(path.relative_to(self.server.root))
                found[name] = path
        return dict(sorted(found.items()))

    def info_of(self, files):
        """What the hub says about a data set."""
        return {
            "id": "me/set",
            "sha": self.commit,
            "siblings": [{"rfilename": name} for name in files],
            "tags": [],
        }

    def send(self, status, body, with_body, more_headers=None):
        checksum = hashlib.md5(body).hexdigest()
        headers = {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            "ETag": f'"{checksum}"',
            "X-Repo-Commit": self.commit,
        }
        headers.update(more_headers or {})
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def tree_of(files):
    """What the hub says about the files of a data set."""
    entries = []
    for name, path in files.items():
        entry = {
            "type": "file",
            "path": name,
            "size": path.stat().st_size,
            "oid": "0" * 40,
        }
        entries.append(entry)
    return entries


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
    def import_hf(data_set, out):
        return main(["data", "import-hf", data_set, str(tmp_path / out)])

    with local_hub(source) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert import_hf("me/other", "other") == 2
        assert "the hub has no data set me/other" in capsys.readouterr().err
        assert import_hf("me/set", "out") == 0
    assert len(open_split(tmp_path / "out")) == 370
    assert not (tmp_path / "out/.download").exists()

    # A hub that no longer answers. huggingface_hub tries six times, and waits in between.
    with local_hub(source) as server:
        port = server.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert import_hf("me/set", "late") == 1
    assert "cannot be downloaded" in capsys.readouterr().err
