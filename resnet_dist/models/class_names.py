"""The names of classes: WordNet ids of ImageNet, and words for them.

A data set names its classes by folders. Those of ImageNet are WordNet ids such as n01440764, for
which a person wants to read "tench".
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from resnet_dist.checkpoints.torchvision_weights import imagenet_words
from resnet_dist.files import write_file
from resnet_dist.text import printable

WORDS_FILE = "class_words.tsv"
"""Name of the file in a data folder with the words of its classes: a line `<folder>TAB<words>` for
each. `resnet-dist data import-imagenet` writes it.
"""

BACKGROUND = "background"
"""The name of class 0 in networks with 1,001 classes, as TensorFlow's ImageNet networks have."""

_NUM_IMAGENET = 1000


@cache
def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 classes of ILSVRC 2012, sorted: class i of ImageNet networks."""
    file = resources.files("resnet_dist.models") / "imagenet_wnids.txt"
    return tuple(file.read_text().split())


def assumed_names(num_classes: int) -> list[str]:
    """The names of the outputs of a network that does not say them.

    Returns:
        For 1,000 outputs ImageNet's WordNet ids, for 1,001 the same after "background"; otherwise
        an empty list.
    """
    if num_classes == _NUM_IMAGENET:
        return list(imagenet_ids())
    if num_classes == _NUM_IMAGENET + 1:
        return [BACKGROUND, *imagenet_ids()]
    return []


def words_of(names: Sequence[str], data_dir: str = "") -> list[str]:
    """What to print for classes.

    Args:
        names: The names of the classes, as their folders.
        data_dir: A data folder that may have a file `WORDS_FILE`.

    Returns:
        For each class the words in that file, or ImageNet's words, or its name.
    """
    words = dict(_read_words(Path(data_dir, WORDS_FILE)) if data_dir else {})
    known_ids = set(imagenet_ids())
    if any(name in known_ids and name not in words for name in names):
        for wnid, text in zip(imagenet_ids(), imagenet_words(), strict=True):
            words.setdefault(wnid, text)
    return [words.get(name, name) for name in names]


def format_words(words: dict[str, str]) -> str:
    """The content of a file `WORDS_FILE`.

    Args:
        words: For each class its words, on one line.
    """
    lines = []
    for name, meaning in words.items():
        lines.append(f"{name}\t{' '.join(meaning.split())}\n")
    return "".join(lines)


def copy_words(source: Path, target: Path) -> None:
    """Copy the file `WORDS_FILE` from one data folder to another, if there is one.

    Raises:
        ValueError: The file cannot be read.
    """
    words = _read_words(source / WORDS_FILE)
    if words:
        write_file(target / WORDS_FILE, format_words(words))


def _read_words(path: Path) -> dict[str, str]:
    """Read a file of words; empty if there is none.

    Raises:
        ValueError: The file cannot be read, or a line has no tab.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{printable(path)} cannot be read: {problem}") from problem
    words = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, tab, meaning = line.partition("\t")
        if not line.strip():
            continue
        if not tab or not name or not meaning:
            raise ValueError(
                f"{printable(path)}, line {number}: it must be a folder, a tab and words, as "
                "n01440764<tab>tench; correct the line, or remove the file"
            )
        words[name] = meaning
    return words
