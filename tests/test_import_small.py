"""`data import-tiny-imagenet` and `data import-cifar10`: to the folders that training reads."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest
from data_files import contents, modification_times, run_and_kill, tar_bytes, write_tree
from image_files import open_image
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
    class_folder = out / "val" / TINY_WNIDS[0]
    class_folder.mkdir(parents=True, exist_ok=True)
    (class_folder / "val_0.JPEG").touch()
    for _ in range(2):
        assert import_tiny(archive, out) == 0
        assert contents(out) == expected
    assert modification_times(out, half) == times, "written once"


def without(prefix):
    """Tiny-ImageNet without the files whose names begin so."""
    return {name: data for name, data in TINY.items() if not name.startswith(prefix)}


def with_annotations(content):
    """Tiny-ImageNet with another list of the classes of its validation images."""
    return TINY | {"val/val_annotations.txt": content}


ANNOTATIONS = TINY["val/val_annotations.txt"]
FIRST_LINE, _, _ = ANNOTATIONS.partition(b"\n")
# Part of the error for each set that is not complete.
BROKEN_SETS = {
    "has no val/val_annotations.txt": without("val/val_annotations.txt"),
    "no training images in train/<wnid>/images/": without("train"),
    "the class train/n01443537 has no images": without("train/n01443537/images"),
    "train/n01629819/images/n01629819_1.JPEG is missing, which": without(
        "train/n01629819/images/n01629819_1"
    ),
    "line 3: val/images/ has no image 'val_2.JPEG'": without("val/images/val_2"),
    "line 1: 'n1' is no class": with_annotations(b"val_0.JPEG\tn1\t0\n" + ANNOTATIONS),
    "line 2: '' is no class": with_annotations(FIRST_LINE + b"\nval_1.JPEG\n"),
    "line 5: val/images/ has no image 'val_0": with_annotations(ANNOTATIONS + ANNOTATIONS),
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
        printed = capsys.readouterr().err
        is_one_line = len(printed.splitlines()) == 1
        is_right = code == 2 and is_one_line and said in printed and not out.exists()
        if not is_right:
            failures.append((said, code, printed))
    assert failures == []


def assert_one_line(printed, said):
    """An error of one line, with these words."""
    assert len(printed.splitlines()) == 1, printed
    assert said in printed, printed


def test_other_folders_and_damaged_zip_files(tmp_path, capsys):
    archive = write_tiny_zip(tmp_path / "tiny.zip", TINY)
    whole = archive.read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    spoiled = tmp_path / "spoiled.zip"
    start = whole.index(b"n01629819_2.JPEG") + 40
    spoiled.write_bytes(whole[:start] + bytes(50) + whole[start + 50 :])
    of_something_else = write_tiny_zip(tmp_path / "plain.zip", {"readme.txt": b"x"})
    bad_sources = {
        "is not Tiny-ImageNet": tmp_path,
        "nowhere does not exist": tmp_path / "nowhere",
        "is damaged, or no zip file": cut,
        "train/n01629819/images/n01629819_2.JPEG": spoiled,
        "plain.zip is not Tiny-ImageNet": of_something_else,
    }
    for said, source in bad_sources.items():
        assert import_tiny(source, tmp_path / "out") == 2, said
        assert_one_line(capsys.readouterr().err, said)

    folder = write_tree(tmp_path / "set", TINY)
    with_another_class = tmp_path / "other"
    (with_another_class / "train" / "cat").mkdir(parents=True)
    bad_targets = {
        "is the folder to read": folder,
        "a folder cat, which is no class": with_another_class,
    }
    for said, out in bad_targets.items():
        assert import_tiny(folder, out) == 2, said
        assert_one_line(capsys.readouterr().err, said)


def import_cifar(source, out, *options):
    return main(["data", "import-cifar10", str(source), str(out), *options])


@pytest.fixture
def published(monkeypatch):
    """Let our small files be the published ones."""
    from torchvision.datasets import CIFAR10

    sums = []
    for path, data in cifar_python().items():
        name = os.path.basename(path)
        md5 = hashlib.md5(data).hexdigest()
        sums.append([name, md5])
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
    pixels = np.asarray(open_image(expected["train/cat/00003.png"]))
    assert np.array_equal(pixels, cifar_image(CIFAR_PIXELS[3]))


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
    with_another_byte = files[name][:-1] + b"\x00"
    changed = files | {name: with_another_byte}
    incomplete = dict(files)
    del incomplete[name]
    with_short_batch = cifar_binary() | {"cifar-10-batches-bin/test_batch.bin": b"12"}
    good = tar_bytes(files, "w:gz")
    bad_archives = {
        "data_batch_2 is not the published file": tar_bytes(changed),
        "has neither data_batch_2 nor data_batch_2.bin": tar_bytes(incomplete),
        "is damaged, or no tar file": good[: len(good) // 2],
        "its size is no multiple of 3073": tar_bytes(with_short_batch),
    }
    archive = tmp_path / "archive"
    out = tmp_path / "out"
    for said, content in bad_archives.items():
        archive.write_bytes(content)
        assert import_cifar(archive, out) == 2
        assert_one_line(capsys.readouterr().err, said)
        assert not out.exists()

    assert import_cifar(tmp_path / "nowhere", out) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_cifar10_runs_no_code_of_its_pickles(tmp_path, published, capsys):
    files = cifar_python()
    name = "cifar-10-batches-py/data_batch_2"
    files[name] = pickle.dumps({b"data": shutil.rmtree, b"labels": []})
    archive = tmp_path / "archive"
    archive.write_bytes(tar_bytes(files))
    assert import_cifar(archive, tmp_path / "out", "--skip_checksums") == 2
    assert "it needs shutil.rmtree" in capsys.readouterr().err
