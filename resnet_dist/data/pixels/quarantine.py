"""Broken images: the record of them, their limit, and what is shown in their place."""

import base64
import dataclasses
import json
import os
import warnings

from resnet_dist.data.pixels.read import DEFAULT_LIMITS, Encoded, ReadLimits, load
from resnet_dist.data.sources.index import Index
from resnet_dist.text import printable

_BLACK_PIXEL_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


class Quarantine:
    """The broken images that this process has met, and the limit that stops the run."""

    def __init__(self, output_dir: str, split: str, rank: int, limit: int | None) -> None:
        """Begin with an empty record.

        Args:
            output_dir: folder of quarantine.jsonl, which all ranks and runs append to.
            split: "train" or "val".
            rank: of this process.
            limit: how many are tolerated (data.max_bad_images); None for any number.
        """
        self.path = os.path.join(output_dir, "quarantine.jsonl")
        self.split = split
        self.rank = rank
        self.limit = limit
        self.files: dict[str, str] = {}
        """reason, by path"""

    def add(
        self, file: str, reason: str, *, epoch: int | None = None, step: int | None = None
    ) -> None:
        """Record a broken image once. Raises ValueError if there are more than `limit`."""
        if file in self.files:
            return
        self.files[file] = reason
        line = {
            "path": file,
            "reason": reason,
            "split": self.split,
            "rank": self.rank,
            "epoch": epoch,
            "step": step,
        }
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as record:
                # One write of one line, so that ranks do not mix theirs.
                record.write(json.dumps(line) + "\n")
        except OSError as error:
            text = f"{file} is broken ({reason}); {self.path} could not be written: {error}"
            warnings.warn(printable(text), stacklevel=2)
        if self.limit is not None and len(self.files) > self.limit:
            text = (
                f"{len(self.files)} broken {self.split} images on rank {self.rank}, more than "
                f"data.max_bad_images = {self.limit}. The last one is {file}: {reason}. All are "
                f"listed in {self.path}: repair or remove them, or raise data.max_bad_images"
            )
            raise ValueError(printable(text))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The sample that a training step has asked for."""

    row: int
    epoch: int
    step: int


def next_good(
    index: Index,
    encoded: Encoded,
    quarantine: Quarantine,
    wanted: Wanted,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Encoded:
    """`encoded`, or if it is broken the next good image of the index, which wraps around.

    Each broken one is recorded. The choice depends on the files alone, so it is the same on every
    number of ranks. Raises ValueError if no image is good, or the quarantine is full.
    """
    while encoded.reason is not None:
        path = index.path(encoded.row)
        quarantine.add(path, encoded.reason, epoch=wanted.epoch, step=wanted.step)
        row = (encoded.row + 1) % len(index)
        if row == wanted.row:
            raise ValueError(
                f"none of the {len(index)} images in {index.root} can be decoded; the reasons are "
                f"in {quarantine.path}"
            )
        encoded = load(index, row, limits)
    return encoded


def blank(encoded: Encoded) -> Encoded:
    """A black image in place of a broken one, with its row and reason."""
    return dataclasses.replace(encoded, data=_BLACK_PIXEL_PNG, height=1, width=1)
