"""The data set of the quickstart: 1,797 handwritten digits, which are written to image files once.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, DOI 10.24432/C50P49, CC BY 4.0 (see digits.LICENSE.txt). The package contains
digits.npz with images of 8 x 8 pixels, whose values are 0 to 16.
"""

import tempfile
from pathlib import Path

import numpy as np

SIZE = 32
"""Height and width of the written images: the input size of the CIFAR networks."""

# Name of a file that is written last, so that it marks a complete folder.
_COMPLETE = ".resnet_dist_digits"
_LARGEST_VALUE = 16

# One of so many images of each class is for validation.
_VAL_INTERVAL = 5


NUM_TRAIN_DIGITS = 1442
"""Number of training images that `write_digits` writes."""


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read the data set that is contained in the package.

    Returns:
        Images, uint8 [1797, 8, 8] with values from 0 to 16, and labels, int64 [1797].
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        packed = stored["pixels"]
        labels = stored["labels"]
    images = packed.reshape(-1, 8, 8)
    return images, labels.astype(np.int64)


def write_digits(data_dir: str) -> None:
    """Write the digits to data_dir/train/<digit>/ and data_dir/val/<digit>/ as JPEG files.

    Every fifth image of each class goes to val, which gives 1,442 images for training and 355 for
    validation. If the files exist already, nothing is written. The files are written to a temporary
    folder beside `data_dir`, which is renamed when it is complete, so that a killed process does
    not leave an incomplete data set. Call this function in one process only.

    Args:
        data_dir: the folder to write to. It must be empty, or not exist yet.

    Raises:
        ValueError: if `data_dir` is an empty string, or a folder with other contents.
    """
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name a folder that the digits can be written to, for instance "
            "--data.data_dir data/digits"
        )
    target = Path(data_dir).absolute()
    if (target / _COMPLETE).is_file():
        return
    is_used_folder = target.is_dir() and any(target.iterdir())
    if target.is_file() or is_used_folder:
        raise ValueError(
            f"data.data_dir {data_dir!r} has contents that are not the digits: with data.kind "
            f"digits name a folder that is empty or does not exist yet; for your own data use "
            f"--data.kind folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        # Other users cannot read the temporary folder itself. A new folder in it has the usual
        # permissions.
        folder = Path(temporary, target.name)
        _write_files(folder)
        try:
            # The target may be an empty folder, or not exist.
            folder.replace(target)
        except OSError:
            # Another run may have written the digits in the meantime.
            if not (target / _COMPLETE).is_file():
                raise


def _write_files(folder: Path) -> None:
    """Write all image files, and at last the file that marks the folder as complete."""
    images, labels = load_digits()
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        for number, row in enumerate(rows):
            is_val = number % _VAL_INTERVAL == _VAL_INTERVAL - 1
            split = "val" if is_val else "train"
            path = folder / split / str(digit) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_image(path, images[row])
    (folder / _COMPLETE).write_text(
        "written by resnet_dist.data.sources.digits; the images are complete\n"
    )


def _write_image(path: Path, values: np.ndarray) -> None:
    """Enlarge one digit to SIZE x SIZE pixels and save it as JPEG.

    Args:
        path: the file to write.
        values: uint8 [8, 8] with values from 0 to 16.
    """
    from PIL import Image

    scale = 255 / _LARGEST_VALUE
    pixels = np.round(values * scale).astype(np.uint8)
    small = Image.fromarray(pixels)
    # Bicubic interpolation gives smooth strokes. Nearest neighbours would give blocks of 4 x 4.
    image = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image.convert("RGB").save(path, quality=95, subsampling=0)
