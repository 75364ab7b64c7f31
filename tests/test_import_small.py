"""`data import-tiny-imagenet` and `data import-cifar10`: to the folders that training reads."""

import hashlib
import io
import os
import pickle
import shutil

import numpy as np
import pytest
from data_files import contents, modification_times, run_and_kill, tar_bytes, write_tree
from PIL import Image
from published_sets import (
    CIFAR_PIXELS,
    TINY,
    TINY_WNIDS,
    cifar_binary,
    cifar_image,
    cifar_python,
    imported_tiny_imagenet,
    write_tiny_zip,
)

from resnet_dist.cli import main
from resnet_dist.models.class_names import words_of


def import_tiny(source, out):
    return main(["data", "import-tiny-imagenet", str(source), str(out)])


def test_tiny_imagenet_from_a_folder_and_from_the_zip_file(tmp_path):
    folder = write_tree(tmp_path / "unpacked" / "tiny-imagenet-200", TINY)
    archive = write_tiny_zip(tmp_path / "tiny.zip", TINY)
    expected = imported_tiny_imagenet()
    for number, source in enumerate((folder, folder.parent, archive)):
        out = tmp_path / str(number)
        assert import_tiny(source, out) == 0
        assert contents(out) == expected
    assert words_of(TINY_WNIDS, str(out))[0] == "goldfish, Carassius auratus"


def test_an_interrupted_import_goes_on(tmp_path):
    archive = write_tiny_zip(tmp_path / "tiny.zip", TINY)
    out = tmp_path / "out"
    expected = imported_tiny_imagenet()
    run_and_kill(import_tiny, 7, archive, out)
    half = contents(out)
    assert 0 < len(half) < len(expected)
    assert half.items() <= expected.items()
    times = modification_times(out, half)
    # What a crash of the machine may leave.
    (out / "val" / TINY_WNIDS[0]).mkdir(parents=True, exist_ok=True)
    (out / "val" / TINY_WNIDS[0] / "val_0.JPEG").touch()
    for _ in range(2):
        assert import_tiny(archive, out) == 0
        assert contents(out) == expected
    assert modification_times(out, half) == times, "written once"


def without(*names):
    """Tiny-ImageNet without the files whose names begin so."""
    return {name: data for name, data in TINY.items() if not name.startswith(names)}


LINES = TINY["val/val_annotations.txt"]
BROKEN_SETS = {
    "has no val/val_annotations.txt": without("val/val_annotations.txt"),
    "no training images in train/<wnid>/images/": without("train"),
    "the class train/n01443537 has no images": without("train/n01443537/images"),
    "train/n01629819/images/n01629819_1.JPEG is missing, which": without(
        "train/n01629819/images/n01629819_1"
    ),
    "line 3: val/images/ has no image 'val_2.JPEG'": without("val/images/val_2"),
    "line 1: 'n1' is no class": TINY | {"val/val_annotations.txt": b"val_0.JPEG\tn1\t0\n" + LINES},
    "line 2: '' is no class": TINY | {"val/val_annotations.txt": LINES[:32] + b"val_1.JPEG\n"},
    "line 5: val/images/ has no image 'val_0": TINY | {"val/val_annotations.txt": LINES + LINES},
    "has no line for val/images/extra.JPEG": TINY | {"val/images/extra.JPEG": b"x"},
    "is not text": TINY | {"words.txt": b"\xff\xfe"},
}


def test_what_is_wrong_with_tiny_imagenet_is_one_sentence(tmp_path, capsys):
    """And nothing is written."""
    failures = []
    out = tmp_path / "out"
    for number, (said, files) in enumerate(BROKEN_SETS.items()):
        folder = write_tree(tmp_path / f"set{number}", files)
        code = import_tiny(folder, out)
        lines = capsys.readouterr().err.splitlines()
        if code != 2 or len(lines) != 1 or said not in lines[0] or out.exists():
            failures.append((said, code, lines))
    assert failures == []


def test_other_folders_and_damaged_zip_files(tmp_path, capsys):
    folder = write_tree(tmp_path / "set", TINY)
    archive = write_tiny_zip(tmp_path / "tiny.zip", TINY)
    whole = archive.read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    spoiled = tmp_path / "spoiled.zip"
    place = whole.index(b"n01629819_2.JPEG") + 40
    spoiled.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
    other = tmp_path / "other"
    (other / "train" / "cat").mkdir(parents=True)
    plain = write_tiny_zip(tmp_path / "plain.zip", {"readme.txt": b"x"})
    cases = {
        "is not Tiny-ImageNet": (tmp_path, tmp_path / "out"),
        "nowhere does not exist": (tmp_path / "nowhere", tmp_path / "out"),
        "is damaged, or no zip file": (cut, tmp_path / "out"),
        "train/n01629819/images/n01629819_2.JPEG": (spoiled, tmp_path / "out"),
        "plain.zip is not Tiny-ImageNet": (plain, tmp_path / "out"),
        "is the folder to read": (folder, folder),
        "a folder cat, which is no class": (folder, other),
    }
    for said, (source, out) in cases.items():
        assert import_tiny(source, out) == 2, said
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0], lines


def import_cifar(source, out, *options):
    return main(["data", "import-cifar10", str(source), str(out), *options])


@pytest.fixture
def published(monkeypatch):
    """Let our small files be the published ones."""
    from torchvision.datasets import CIFAR10

    sums = []
    for name, data in cifar_python().items():
        sums.append([os.path.basename(name), hashlib.md5(data).hexdigest()])
    *train_sums, test_sum = sums
    monkeypatch.setattr(CIFAR10, "train_list", train_sums)
    monkeypatch.setattr(CIFAR10, "test_list", [test_sum])


def write_tar_gz(path, files):
    path.write_bytes(tar_bytes(files, "w:gz"))
    return path


def test_cifar10_from_both_versions_packed_or_not(tmp_path, published, capsys):
    python_archive = write_tar_gz(tmp_path / "cifar-10-python.tar.gz", cifar_python())
    binary_archive = write_tar_gz(tmp_path / "b.tar.gz", cifar_binary())
    python_folder = write_tree(tmp_path / "py", cifar_python())
    binary_folder = write_tree(tmp_path / "bin", cifar_binary())
    sources = (
        python_archive,
        # The folder that holds the archive.
        tmp_path,
        binary_archive,
        python_folder,
        binary_folder / "cifar-10-batches-bin",
    )
    imported = []
    for number, source in enumerate(sources):
        out = tmp_path / str(number)
        assert import_cifar(source, out) == 0, capsys.readouterr().err
        imported.append(contents(out))
    expected = imported[0]
    for other in imported[1:]:
        assert other == expected
    assert len(expected) == 12
    assert "val/ship/00000.png" in expected
    found = np.asarray(Image.open(io.BytesIO(expected["train/cat/00003.png"])))
    assert np.array_equal(found, cifar_image(CIFAR_PIXELS[3]))


def test_a_killed_import_of_cifar10_goes_on(tmp_path, published):
    archive = write_tar_gz(tmp_path / "cifar-10-python.tar.gz", cifar_python())
    assert import_cifar(archive, tmp_path / "whole") == 0
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    run_and_kill(import_cifar, 5, archive, out)
    assert contents(out).items() < expected.items()
    assert import_cifar(archive, out) == 0
    assert contents(out) == expected


def test_cifar10_that_is_not_the_published_one(tmp_path, published, capsys):
    files = cifar_python()
    name = "cifar-10-batches-py/data_batch_2"
    changed = files | {name: files[name][:-1] + b"\x00"}
    incomplete = {key: data for key, data in files.items() if key != name}
    cut = cifar_binary() | {"cifar-10-batches-bin/test_batch.bin": b"12"}
    good = tar_bytes(files, "w:gz")
    archives = {
        "data_batch_2 is not the published file": tar_bytes(changed),
        "has neither data_batch_2 nor data_batch_2.bin": tar_bytes(incomplete),
        "is damaged, or no tar file": good[: len(good) // 2],
        "its size is no multiple of 3073": tar_bytes(cut),
    }
    for said, content in archives.items():
        (tmp_path / "archive").write_bytes(content)
        assert import_cifar(tmp_path / "archive", tmp_path / "out") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0], lines
        assert not (tmp_path / "out").exists()
    assert import_cifar(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_cifar10_runs_no_code_of_its_pickles(tmp_path, published, capsys):
    files = cifar_python()
    name = "cifar-10-batches-py/data_batch_2"
    evil = pickle.dumps({b"data": shutil.rmtree, b"labels": []})
    (tmp_path / "archive").write_bytes(tar_bytes(files | {name: evil}))
    assert import_cifar(tmp_path / "archive", tmp_path / "out", "--skip_checksums") == 2
    assert "it needs shutil.rmtree" in capsys.readouterr().err
