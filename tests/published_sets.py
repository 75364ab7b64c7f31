"""Small copies of public data sets, with the names and formats of the published files."""

import pickle
import zipfile

import numpy as np
from image_files import encode, picture

TINY_WNIDS = ("n01443537", "n01629819")
# The class of each validation image.
TINY_VAL = {
    "val_0.JPEG": "n01443537",
    "val_1.JPEG": "n01629819",
    "val_2.JPEG": "n01443537",
    "val_3.JPEG": "n01629819",
}


def tiny_imagenet():
    """Tiny-ImageNet with two classes, and six images for training, four for validation and one for
    test: {name: bytes}.
    """
    files = {
        "test/images/test_0.JPEG": encode(picture(64, 64, 20)),
        "wnids.txt": "\n".join(reversed(TINY_WNIDS)).encode(),
        "words.txt": (
            b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n"
            b"n01629819\tEuropean fire salamander, Salamandra salamandra\n"
        ),
    }
    for wnid in TINY_WNIDS:
        boxes = ""
        for number, name in enumerate(train_names(wnid)):
            files[f"train/{wnid}/images/{name}"] = encode(picture(64, 64, seed=number))
            boxes += f"{name}\t0\t10\t63\t58\n"
        files[f"train/{wnid}/{wnid}_boxes.txt"] = boxes.encode()
    annotations = ""
    for number, (name, wnid) in enumerate(TINY_VAL.items()):
        files[f"val/images/{name}"] = encode(picture(64, 64, seed=10 + number))
        annotations += f"{name}\t{wnid}\t0\t32\t44\t62\n"
    files["val/val_annotations.txt"] = annotations.encode()
    return files


def train_names(wnid):
    """The names of the training images of a class of Tiny-ImageNet."""
    return [f"{wnid}_{number}.JPEG" for number in range(3)]


TINY = tiny_imagenet()


def imported_tiny_imagenet():
    """What the import makes of `TINY`: {name: bytes}."""
    # The first line is not of a class of the set.
    _, _, of_the_set = TINY["words.txt"].partition(b"\n")
    files = {"class_words.tsv": of_the_set}
    for wnid in TINY_WNIDS:
        for name in train_names(wnid):
            files[f"train/{wnid}/{name}"] = TINY[f"train/{wnid}/images/{name}"]
    for name, wnid in TINY_VAL.items():
        files[f"val/{wnid}/{name}"] = TINY[f"val/images/{name}"]
    return files


def write_tiny_zip(path, files):
    """{name: bytes} in a zip file as Tiny-ImageNet's; returns `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    return path


CIFAR_PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3072), np.uint8)
CIFAR_LABELS = [3, 8, 8, 3, 8, 3, 8, 3, 3, 8, 8, 3]
CIFAR_BATCHES = {
    "data_batch_1": slice(0, 2),
    "data_batch_2": slice(2, 4),
    "data_batch_3": slice(4, 6),
    "data_batch_4": slice(6, 8),
    "data_batch_5": slice(8, 10),
    "test_batch": slice(10, 12),
}


def cifar_image(row):
    """A row of CIFAR-10's pixels as an image [32, 32, 3]."""
    return row.reshape(3, 32, 32).transpose(1, 2, 0)


def cifar_python():
    """The files of CIFAR-10's python version: {name: bytes}."""
    files = {}
    for name, rows in CIFAR_BATCHES.items():
        content = {b"data": CIFAR_PIXELS[rows], b"labels": CIFAR_LABELS[rows]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(content)
    return files


def cifar_binary():
    """The files of CIFAR-10's binary version: {name: bytes}."""
    labels = np.array(CIFAR_LABELS, np.uint8)
    records = np.concatenate([labels[:, None], CIFAR_PIXELS], axis=1)
    files = {}
    for name, rows in CIFAR_BATCHES.items():
        files[f"cifar-10-batches-bin/{name}.bin"] = records[rows].tobytes()
    return files
