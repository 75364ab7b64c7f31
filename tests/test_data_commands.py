"""`resnet-dist data`: import, download, verify and show, each for real on a small set."""

import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from data_files import contents, modification_times, run_and_kill, tar_bytes, write_tree
from dist_utils import free_port, options, run_command
from image_files import OneProcess, encode, picture, train_loader, write_split
from PIL import Image
from published_sets import cifar_image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, Flowers102, Imagenette, imagenet

from resnet_dist.cli import main
from resnet_dist.data.sources.scan import build_index

# By ILSVRC2012_ID, which is in another order.
WNIDS = {7: "n00000002", 3: "n00000001", 12: "n00000003"}
# The ILSVRC2012_ID of each validation image.
TRUTH = [12, 3, 3, 7, 12]


def train_images():
    """Four of each class: {name: bytes}."""
    files = {}
    for wnid in WNIDS.values():
        for number in range(4):
            name = f"{wnid}/{wnid}_{number}.JPEG"
            files[name] = encode(picture(40, 50, seed=number))
    return files


def val_images():
    files = {}
    for number, class_id in enumerate(TRUTH, 1):
        wnid = WNIDS[class_id]
        name = f"{wnid}/ILSVRC2012_val_{number:08d}.JPEG"
        files[name] = encode(picture(50, 40, seed=number))
    return files


TRAIN = train_images()
VAL = val_images()

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def synsets():
    """meta.mat as the devkit has it: a struct array with the classes and the groups that they are
    in.
    """
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    rows = []
    for class_id, wnid in WNIDS.items():
        rows.append((class_id, wnid, "a word, another", "a gloss", 0, np.empty(0), 0, 4))
    children = np.array(list(WNIDS))
    rows.append((1001, "n00009999", "group", "a group", 3, children, 1, 0))
    column = np.array(rows, dtype=fields)[:, None]
    return mat_bytes(synsets=column)


def mat_bytes(**arrays):
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def md5(data):
    return hashlib.md5(data).hexdigest()


def publish(monkeypatch, folder):
    """Let the sums of the archives in `folder` be the published ones."""
    published = {}
    for key, (name, _) in imagenet.ARCHIVE_META.items():
        published[key] = (name, md5((folder / name).read_bytes()))
    monkeypatch.setattr(imagenet, "ARCHIVE_META", published)


def by_file_name(files):
    """The files without their folders."""
    return {os.path.basename(name): data for name, data in files.items()}


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with the three archives of ImageNet."""
    files = {
        TRAIN_ARCHIVE: train_archive(),
        VAL_ARCHIVE: val_archive(),
        DEVKIT: devkit_archive(),
    }
    folder = write_tree(tmp_path / "archives", files)
    publish(monkeypatch, folder)
    return folder


def train_archive():
    """A tar with a tar for each class."""
    tar_of_classes = {}
    for wnid in WNIDS.values():
        of_class = {name: data for name, data in TRAIN.items() if wnid in name}
        tar_of_classes[f"{wnid}.tar"] = tar_bytes(by_file_name(of_class))
    return tar_bytes(tar_of_classes)


def val_archive():
    """A tar of all images, which is not sorted, as the published one."""

    def checksum_of_name(name):
        return md5(name.encode())

    names = sorted(VAL, key=checksum_of_name)
    files = {name: VAL[name] for name in names}
    return tar_bytes(by_file_name(files))


def devkit_archive():
    truth = "\n".join(str(class_id) for class_id in TRUTH)
    folder = "ILSVRC2012_devkit_t12/data"
    files = {
        f"{folder}/meta.mat": synsets(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    return tar_bytes(files, "w:gz")


def run_import(archives, out, *options):
    return main(["data", "import-imagenet", str(archives), str(out), *options])


def test_import_to_folders_goes_on_after_a_kill(archives, tmp_path):
    lines = [f"{wnid}\ta word, another\n" for wnid in WNIDS.values()]
    expected = {"class_words.tsv": "".join(lines).encode()}
    for name, data in TRAIN.items():
        expected[f"train/{name}"] = data
    for name, data in VAL.items():
        expected[f"val/{name}"] = data
    out = tmp_path / "out"

    # The record of the checked archives is written three times, with three calls each.
    run_and_kill(run_import, 9 + 6, archives, out)

    half = contents(out)
    assert len(half) == 5
    assert half.items() <= expected.items()
    times = modification_times(out, half)
    assert run_import(archives, out) == 0
    assert contents(out) == expected
    assert modification_times(out, half) == times, "written once"


def test_import_to_shards_is_the_import_packed(archives, tmp_path):
    assert run_import(archives, tmp_path / "folders") == 0
    assert main(["data", "pack", str(tmp_path / "folders"), str(tmp_path / "packed")]) == 0
    assert run_import(archives, tmp_path / "shards", "--shards", "--workers", "1") == 0
    found = contents(tmp_path / "shards")
    assert found == contents(tmp_path / "packed")
    assert sorted(found) == [
        "class_words.tsv",
        "train/index.bin",
        "train/shards.json",
        "train/train-000000.tar",
        "train/train-000000.tar.idx",
        "val/index.bin",
        "val/shards.json",
        "val/val-000000.tar",
        "val/val-000000.tar.idx",
    ]


def test_archives_of_another_content_are_refused(archives, tmp_path, capsys):
    """By their MD5 sums, which are computed once for each file."""
    out = tmp_path / "out"
    val = archives / VAL_ARCHIVE
    good = val.read_bytes()
    image = VAL[f"{WNIDS[12]}/ILSVRC2012_val_00000001.JPEG"]
    place = good.index(image[-40:])
    val.write_bytes(good[:place] + b"x" + good[place + 1 :])
    assert run_import(archives, out) == 2
    said = capsys.readouterr().err
    assert "val.tar is not the published file: its MD5 sum is not" in said
    assert "--skip_checksums" in said
    assert not contents(out)
    assert names_of_checked_archives(out) == [TRAIN_ARCHIVE]
    assert run_import(archives, tmp_path / "other", "--skip_checksums") == 0

    val.write_bytes(good)
    assert run_import(archives, out) == 0
    assert len(names_of_checked_archives(out)) == 3


def names_of_checked_archives(out):
    text = (out / ".archives.json").read_text()
    return [name for name, *_ in json.loads(text)]


def test_no_bar_is_drawn_into_a_pipe(archives, tmp_path, capsys):
    assert run_import(archives, tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def test_home_and_variables_in_paths(archives, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert run_import("~/archives", "$PLACE/out") == 0
    assert main(["data", "pack", "~/out", "~/packed"]) == 0
    assert (tmp_path / "packed/train/index.bin").exists()
    capsys.readouterr()
    assert main(["data", "pack", "/no/such/folder", "~/x"]) == 2
    said = capsys.readouterr().err
    assert said.count("/no/such/folder") == 1
    assert "data.data_dir '/no/such/folder' does not exist here: name" in said


def special(name, kind, target=""):
    """A member of a tar that is no file."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


EVIL_MEMBERS = {
    "../n1_0.JPEG": b"x",
    "/tmp/n1_0.JPEG": b"x",
    "a/n1_0.JPEG": b"x",
    "..": b"x",
    ".hidden.JPEG": b"x",
    "link.JPEG": special("link.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    "hard.JPEG": special("hard.JPEG", tarfile.LNKTYPE, "n1_0.JPEG"),
    "device.JPEG": special("device.JPEG", tarfile.CHRTYPE),
    "folder": special("folder", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("where", ["train", "inner", "val"])
def test_no_member_leaves_the_target(archives, tmp_path, capsys, where):
    """Whether it is in one of the archives, or in the tar of a class inside of one."""
    train = archives / TRAIN_ARCHIVE
    val = archives / VAL_ARCHIVE
    out = tmp_path / "out"
    problems = []
    for name, content in EVIL_MEMBERS.items():
        evil = tar_bytes({name: content})
        if where == "train":
            train.write_bytes(evil)
        elif where == "inner":
            tar_of_classes = {f"{wnid}.tar": evil for wnid in WNIDS.values()}
            train.write_bytes(tar_bytes(tar_of_classes))
        else:
            val.write_bytes(evil)
        code = run_import(archives, out)
        said = capsys.readouterr().err
        is_named = f"{name!r} is refused" in said
        if code != 2 or not is_named or out.exists():
            problems.append((name, code, said))
    assert problems == []


def test_archives_that_are_not_whole_are_refused(archives, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def assert_refused(words):
        assert run_import(archives, out) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()

    train = archives / TRAIN_ARCHIVE
    whole = train.read_bytes()
    damaged = bytearray(whole)
    second_image = whole.index(b"n00000002_1.JPEG")
    damaged[second_image : second_image + 8] = b"\xff" * 8
    train.write_bytes(whole[: len(whole) // 2])
    assert_refused("cut off")
    train.write_bytes(damaged)
    assert_refused("lacks its end marker")
    train.write_bytes(tar_bytes({}))
    assert_refused("lacks n0000000")
    train.write_bytes(b"<html>")
    assert_refused("damaged")

    devkit = archives / DEVKIT
    good = devkit.read_bytes()
    devkit.write_bytes(good[: len(good) // 2])
    assert_refused("is damaged, or not the devkit")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert_refused("pip install scipy")
    devkit.unlink()
    assert_refused("ILSVRC2012_devkit_t12.tar.gz: get them")


@pytest.fixture
def web(tmp_path):
    """A server of tmp_path/web on loopback: its address."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def download(name, out, *options):
    return main(["data", "download", name, str(out), *options])


def publish_cifar10(monkeypatch, folder, pixels):
    """Write CIFAR-10 with six images, and let its sums be the published ones."""
    train = pickle.dumps({"data": pixels[:4], "labels": [1, 0, 1, 1]})
    test = pickle.dumps({"data": pixels[4:], "labels": [0, 1]})
    meta = pickle.dumps({"label_names": ["airplane", "bird"]})
    members = {
        "cifar-10-batches-py/a": train,
        "cifar-10-batches-py/t": test,
        "cifar-10-batches-py/meta": meta,
    }
    archive = tar_bytes(members, "w:gz")
    (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    published_meta = {"filename": "meta", "key": "label_names", "md5": md5(meta)}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "train_list", [["a", md5(train)]])
    monkeypatch.setattr(CIFAR10, "test_list", [["t", md5(test)]])
    monkeypatch.setattr(CIFAR10, "meta", published_meta)


def test_download_cifar10(tmp_path, web, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    publish_cifar10(monkeypatch, tmp_path / "web", pixels)
    out = tmp_path / "out"

    nobody = f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(CIFAR10, "url", nobody)
    assert download("cifar10", out) == 1
    printed = capsys.readouterr().err
    last_line = printed.splitlines()[-1]
    assert last_line.startswith("error: cifar10 cannot be downloaded: ")
    assert printed.count("error: ") == 1

    monkeypatch.setattr(CIFAR10, "url", f"{web}cifar-10-python.tar.gz")
    assert download("cifar10", out) == 0
    assert set(contents(out)) == {
        "train/bird/00000.png",
        "train/airplane/00001.png",
        "train/bird/00002.png",
        "train/bird/00003.png",
        "val/airplane/00000.png",
        "val/bird/00001.png",
    }
    image = np.asarray(Image.open(out / "train/bird/00002.png"))
    assert np.array_equal(image, cifar_image(pixels[2]))
    assert not (out / ".download").exists()

    assert download("cifar10", out) == 2
    assert "has a train/ already" in capsys.readouterr().err
    assert download("mnist", tmp_path / "other") == 2


def test_download_imagenette(tmp_path, web, monkeypatch):
    files = {
        "train/n01440764/0.JPEG": encode(picture(20, 20, 0)),
        "val/n01440764/1.JPEG": encode(picture(20, 20, 1)),
    }
    members = {f"imagenette2-160/{name}": data for name, data in files.items()}
    archive = tar_bytes(members, "w:gz")
    (tmp_path / "web/imagenette2-160.tgz").write_bytes(archive)
    published = {"160px": (f"{web}imagenette2-160.tgz", md5(archive))}
    monkeypatch.setattr(Imagenette, "_ARCHIVES", published)
    out = tmp_path / "out"
    # Left by a run that was killed.
    (out / ".download/imagenette2-160/train/n01440764").mkdir(parents=True)
    assert download("imagenette", out, "--size", "160px") == 0
    assert contents(out) == files


def test_download_flowers102(tmp_path, web, monkeypatch):
    """With the 102 published names. Their training and validation sets are for training here."""
    images = {}
    for number in range(1, 7):
        images[f"image_{number:05d}.jpg"] = encode(picture(20, 20, seed=number))
    members = {f"jpg/{name}": data for name, data in images.items()}
    archive = tar_bytes(members, "w:gz")
    labels = mat_bytes(labels=[2, 1, 100, 2, 1, 3])
    splits = mat_bytes(trnid=[3, 1], valid=[2, 6], tstid=[4, 5])
    served = {
        "102flowers.tgz": archive,
        "imagelabels.mat": labels,
        "setid.mat": splits,
    }
    write_tree(tmp_path / "web", served)
    published = {
        "image": ("102flowers.tgz", md5(archive)),
        "label": ("imagelabels.mat", md5(labels)),
        "setid": ("setid.mat", md5(splits)),
    }
    monkeypatch.setattr(Flowers102, "_download_url_prefix", web)
    monkeypatch.setattr(Flowers102, "_file_dict", published)

    assert download("flowers102", tmp_path / "out") == 0

    folders = {
        "image_00003.jpg": "train/100_blanket_flower",
        "image_00001.jpg": "train/002_hard_leaved_pocket_orchid",
        "image_00002.jpg": "train/001_pink_primrose",
        "image_00006.jpg": "train/003_canterbury_bells",
        "image_00004.jpg": "val/002_hard_leaved_pocket_orchid",
        "image_00005.jpg": "val/001_pink_primrose",
    }
    expected = {}
    for name, folder in folders.items():
        expected[f"{folder}/{name}"] = images[name]
    assert contents(tmp_path / "out") == expected


WHOLE = encode(picture(60, 60, 1))
# Files that cannot be read.
BAD = {
    "cut.jpg": WHOLE[:900],
    "empty.jpg": b"",
    "text.jpg": b"not an image at all",
}
# What `data verify` says of the others that are not plain.
KINDS = {
    "cmyk.jpg": "cmyk",
    "grey.jpg": "grayscale",
    "turned.jpg": "rotated",
    "tiny.jpg": "tiny",
    "png.jpg": "not_jpeg",
    "deep.png": "disagreement",
    "twin.jpg": "duplicate",
}


@pytest.fixture
def odd_set(tmp_path):
    orientation = 0x0112
    exif = Image.Exif()
    exif[orientation] = 6
    levels_of_16_bits = 18 * np.arange(60 * 60, dtype=np.uint16)
    deep = Image.fromarray(levels_of_16_bits.reshape(60, 60))
    files = {
        "cmyk.jpg": encode(picture(60, 60, 2).convert("CMYK")),
        "grey.jpg": encode(picture(60, 60, 3).convert("L")),
        "turned.jpg": encode(picture(60, 60, 4), exif=exif),
        "tiny.jpg": encode(picture(20, 60, 5)),
        "png.jpg": encode(picture(60, 60, 6), "PNG"),
        "deep.png": encode(deep, "PNG"),
        "twin.jpg": encode(picture(60, 60, 100)),
    }
    for number in range(4):
        files[f"good{number}.jpg"] = encode(picture(60, 60, seed=100 + number))
    write_tree(tmp_path / "set/train/a", files | BAD)
    # Equal to good1.jpg.
    val_files = {"v.jpg": encode(picture(60, 60, 101))}
    write_tree(tmp_path / "set/val/a", val_files)
    return tmp_path / "set"


def verify(folder, report, *options):
    code = main(["data", "verify", str(folder), "--report", str(report), *options])
    return code, json.loads(report.read_text())


def names_in(entries):
    """The names of the images in a part of the report."""
    return [name for name, _ in entries]


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_verify(odd_set, tmp_path, form, capsys):
    folder = odd_set
    if form == "shards":
        folder = tmp_path / "shards"
        assert main(["data", "pack", str(odd_set), str(folder)]) == 0
    exclude = tmp_path / "exclude.txt"
    write_exclude = ("--write_exclude", str(exclude))

    code, report = verify(folder, tmp_path / "report.json", *write_exclude, "--workers", "2")

    assert code == 1
    assert report["images"] == 15
    bad_names = [f"train/a/{name}" for name in sorted(BAD)]
    assert names_in(report["broken"]) == bad_names
    for name, kind in KINDS.items():
        assert f"train/a/{name}" in names_in(report[kind]), kind
    assert report["duplicate"] == [
        ["train/a/good1.jpg", "as val/a/v.jpg"],
        ["train/a/twin.jpg", "as train/a/good0.jpg"],
    ]
    assert names_in(report["disagreement"]) == ["train/a/deep.png"]
    assert "3 broken\n  train/a/cut.jpg: " in capsys.readouterr().out
    text = (tmp_path / "report.txt").read_text()
    assert "  train/a/tiny.jpg: 60 x 20\n" in text
    assert exclude.read_text().splitlines() == bad_names
    index = build_index(str(folder), "train", OneProcess(), str(exclude))
    assert len(index) == 11

    verify(folder, tmp_path / "report.json", *write_exclude, "--exclude_duplicates")
    left_out = sorted([*BAD, "good1.jpg", "twin.jpg"])
    expected = [f"train/a/{name}" for name in left_out]
    assert exclude.read_text().splitlines() == expected


def test_verify_survives_what_kills_a_batch(tmp_path):
    """A file with whole markers and a body that DALI refuses; what comes after it is examined all
    the same.
    """
    good = encode(picture(64, 64, 1), "PNG")
    body = good.index(b"IDAT") + 4
    start = body + 20
    end = start + 40
    damaged = good[:start] + b"\xff" * 40 + good[end:]
    files = [
        encode(picture(50, 50, 0)),
        damaged,
        encode(picture(50, 50, 2)),
        encode(picture(50, 50, 3).convert("L")),
    ]
    write_split(tmp_path, files, classes=1)
    code, report = verify(tmp_path, tmp_path / "report.json", "--workers", "1")
    assert code == 1
    assert names_in(report["broken"]) == ["train/class0/0001.jpg"]
    assert names_in(report["grayscale"]) == ["train/class0/0003.jpg"]


def test_verify_names_the_images_that_the_decoder_warns_about(tmp_path, capfd):
    """In the report, and not on stderr."""
    files = [encode(picture(60, 60, number)) for number in range(140)]
    for row in (3, 70, 139):
        whole = files[row]
        end_marker = whole[-2:]
        files[row] = whole[:-400] + end_marker
    write_split(tmp_path, files, classes=1)
    _, report = verify(tmp_path, tmp_path / "report.json", "--workers", "2")
    assert names_in(report["warned"]) == [
        "train/class0/0003.jpg",
        "train/class0/0070.jpg",
        "train/class0/0139.jpg",
    ]
    for _, text in report["warned"]:
        assert "Corrupt JPEG data" in text
    said = capfd.readouterr()
    assert "Corrupt JPEG" not in said.err
    assert said.out.count("Corrupt JPEG") == 3


def test_verify_of_a_clean_set_and_of_none(tmp_path, capsys):
    write_split(tmp_path, [encode(picture(50, 50, i)) for i in range(3)], classes=1)
    code, report = verify(tmp_path, tmp_path / "report.json")
    assert code == 0
    assert report["broken"] == []
    assert report["disagreement"] == []
    assert report["duplicate"] == []
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_show_has_the_pixels_of_training(tmp_path):
    files = [encode(picture(60, 90, i)) for i in range(5)]
    index = write_split(tmp_path, files)
    write_split(tmp_path, files[:3], split="val")
    out = tmp_path / "sheet.png"
    settings = options(
        seed=5,
        data__data_dir=tmp_path,
        data__train_crop_size=32,
        data__val_resize_size=64,
        data__val_crop_size=48,
        distributed__device="cpu",
        augment__repeats=2,
        images=2,
        epochs=3,
        out=out,
    )
    code, printed = run_command(tmp_path, ["data", "show", *settings])
    assert code == 0, printed

    sheet = np.asarray(Image.open(out))
    # Each pixel is shown three times, so that the largest tile, of validation, has 128 or more.
    zoom = 3
    side = zoom * 48
    margin = 6
    height_of_row = side + 42
    width_of_column = side + margin
    assert sheet.shape == (2 * height_of_row + margin, 4 * width_of_column + margin, 3)

    loader = train_loader(index, tmp_path, global_batch_size=1)
    mean = torch.tensor(loader.config.mean)
    std = torch.tensor(loader.config.std)
    rows_of_images = {0: 0, 4: 1}
    shown_side = zoom * 32
    steps_per_epoch = 5
    for step, batch in enumerate(loader.batches(0, 3 * steps_per_epoch)):
        image = int(batch.indices[0])
        if image not in rows_of_images:
            continue
        row = rows_of_images[image]
        column = step // steps_per_epoch
        top = margin + row * height_of_row + 18
        left = margin + column * width_of_column
        tile = sheet[top : top + shown_side : zoom, left : left + shown_side : zoom]
        normalised = batch.images[0].permute(1, 2, 0)
        pixels = (normalised * std + mean) * 255
        assert np.array_equal(tile, pixels.round().byte().numpy())
    loader.close()


PRINT_HELP = """
import sys
from resnet_dist.cli import main
try:
    main(["data", "pack", "--help"])
except SystemExit:
    heavy = {"torch", "numpy", "PIL", "scipy", "torchvision"}
    print(sorted(heavy & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-c", PRINT_HELP]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--shard_mb" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "a", "b", "--resize", "-1"],
        ["pack", "nowhere", "b"],
        ["verify", "nowhere", "--workers", "0"],
        ["import-imagenet", "nowhere", "b"],
    ],
)
def test_mistakes_are_a_sentence(arguments, capsys):
    assert main(["data", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
