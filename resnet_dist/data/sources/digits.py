"""The embedded quickstart set: 1,797 real handwritten digits, written out once as image files.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, DOI 10.24432/C50P49, CC BY 4.0 (see digits.LICENSE.txt). 8x8 pixels with values
0..16 are packed in digits.npz.
"""

import tempfile
from pathlib import Path

import numpy as np

SIZE = 32
"""Side of the written images in pixels: what the CIFAR family of networks is made for."""

_COMPLETE = ".resnet_dist_digits"


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The set as it is embedded: images uint8 [1797, 8, 8] of 0..16, labels int64 [1797]."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        packed, labels = stored["pixels"], stored["labels"]
    return packed.reshape(-1, 8, 8), labels.astype(np.int64)


def write_digits(data_dir: str) -> None:
    """Write the digits to data_dir/train/<digit>/ and data_dir/val/<digit>/ as JPEG files, unless
    they are there.

    Every fifth image of each class goes to val: 1,442 train and 355 val. They are written to a
    folder beside it that is renamed when complete, so that a killed process leaves no half of a
    data set. Call it on one process only. Raises ValueError when `data_dir` is empty, or has other
    contents.
    """
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name a folder that the digits can be written to, for instance "
            "--data.data_dir data/digits"
        )
    target = Path(data_dir).absolute()
    if (target / _COMPLETE).is_file():
        return
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(
            f"data.data_dir {data_dir!r} has contents that are not the digits: with data.kind digits name "
            f"a folder that is empty or does not exist yet; with data of your own use --data.kind folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        # In a folder of it: the temporary one is closed to other users.
        folder = Path(temporary, target.name)
        _write_files(folder)
        try:
            folder.replace(target)  # over an empty folder or none
        except OSError:
            if not (target / _COMPLETE).is_file():  # unless another run was faster
                raise


def _write_files(folder: Path) -> None:
    """All image files, and last the mark that they are complete."""
    from PIL import Image

    images, labels = load_digits()
    for digit in range(10):
        for number, row in enumerate(np.flatnonzero(labels == digit)):
            # 16 * 15.94 = 255; rounding keeps the 17 levels apart. Bicubic, since 4x4 blocks are no
            # strokes.
            pixels = np.round(images[row] * (255 / 16)).astype(np.uint8)
            image = (
                Image.fromarray(pixels)
                .resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                .convert("RGB")
            )
            path = (
                folder / ("val" if number % 5 == 4 else "train") / str(digit) / f"{number:04d}.jpg"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=95, subsampling=0)
    (folder / _COMPLETE).write_text(
        "written by resnet_dist.data.sources.digits; the images are complete\n"
    )
