"""Writing tar shards that this package, webdataset and DALI's readers.webdataset read.

A shard is a plain ustar file; a sample is `<class>/<stem>.<jpg|jpeg|png>` and, behind it,
`<class>/<stem>.cls` with the class id in ASCII digits. The samples are shuffled, every time alike,
for programs that read one after the other. The index has the order and the names of the folders, so
that a run on shards sees the very same samples.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image

from resnet_dist.console import Progress
from resnet_dist.data.pixels.read import check, image_size
from resnet_dist.data.sampling.order import rows_at
from resnet_dist.data.sources.index import PACK_PLAN, SHARD_INDEX, Index, write_index, write_whole
from resnet_dist.data.sources.scan import build_index


class Source(NamedTuple):
    """One image: `<class>/<file>`, and where its bytes are, in a file of their own or a piece of an
    archive.
    """

    name: str
    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes. Raises ValueError when there are fewer than there should be."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise ValueError(
                f"{self.path} ends inside {self.name}: it is cut off, or was changed meanwhile"
            )
        return data


def open_splits(data_dir: str) -> dict[str, Index]:
    """The index of each split that the folder has, opened by this process alone. Raises ValueError
    if it has none.
    """
    alone = SimpleNamespace(
        local_rank=0, on_main=lambda do: do(), bytes_from_main=lambda do: do(), sum_integer=int
    )
    splits = [split for split in ("train", "val") if os.path.isdir(os.path.join(data_dir, split))]
    return {split: build_index(data_dir, split, alone) for split in splits or ["train"]}


def pack(sources: Iterable[Source], split: str, args) -> str:
    """Pack `sources` to out/`split`/`split`-000000.tar and so on, with an index; returns what came
    of it, as text.

    `args` has out, shard_mb (MiB of original bytes in a shard), workers (threads), resize and
    quality. An image whose shorter side is above `resize` (0 = none) is brought down to it (Pillow,
    Lanczos; RGB, no metadata), as JPEG of `quality`, or 90. With a `quality` all others are encoded
    at it too, unless they would not become smaller. The rest keep their bytes, and so do those that
    cannot be decoded. Complete shards are left as they are. Raises ValueError when the folder was
    begun with other settings or images, or a name is too long.
    """
    sources, folder = sorted(sources), Path(args.out, split)
    folder.mkdir(parents=True, exist_ok=True)
    order, keys = rows_at(0, 0, len(sources), np.arange(len(sources))), _keys(sources)
    parts = [one.name.rpartition("/") for one in sources]
    classes = sorted({part[0] for part in parts})
    ids = {name: label for label, name in enumerate(classes)}
    ends = np.cumsum(
        [sources[row].length + 3 * tarfile.BLOCKSIZE for row in order]
    )  # two headers, and the label
    pieces = np.split(order, np.flatnonzero(np.diff((ends - 1) // max(1, args.shard_mb << 20))) + 1)
    paths = [folder / f"{split}-{number:06d}.tar" for number in range(len(pieces))]
    names = hashlib.blake2b(
        repr([(one.name, one.length) for one in sources]).encode("utf-8", "replace"), digest_size=8
    )
    _agree(
        folder / PACK_PLAN,
        {
            "resize": args.resize,
            "quality": args.quality,
            "shard_mb": args.shard_mb,
            "images": names.hexdigest(),
            "shards": len(paths),
        },
    )

    def work(path: Path, rows: np.ndarray) -> dict:
        samples = [(keys[row], ids[parts[row][0]], sources[row]) for row in rows]
        written = _write_shard(path, samples, args.resize, args.quality)
        bar.update(len(rows))
        return written

    # Threads do: files, decoder and encoder work outside Python's lock.
    with Progress(len(sources), f"pack {split}") as bar, ThreadPoolExecutor(args.workers) as pool:
        shards = list(pool.map(work, paths, pieces))
    places = [(number, *place) for number, shard in enumerate(shards) for place in shard["places"]]
    write_index(
        str(folder / SHARD_INDEX),
        classes,
        [ids[parts[row][0]] for row in order],
        [os.fsencode(parts[row][2]) for row in order],
        shards=[path.name for path in paths],
        places=places,
    )
    before, after = sum(one.length for one in sources), sum(place[2] for place in places)
    return "\n".join(
        [
            f"{split}: {len(sources)} images of {len(classes)} classes in {len(paths)} shards, "
            f"{before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after",
            *(
                f"  kept as it was: {split}/{name}: {why}"
                for shard in shards
                for name, why in shard["kept"]
            ),
        ]
    )


def _agree(path: Path, settings: dict) -> None:
    """Write the settings to a file, or raise ValueError when it has others."""
    if path.exists() and (begun := json.loads(path.read_text())) != settings:
        raise ValueError(
            f"{path.parent} was begun with {begun}, and this is {settings}: repeat the arguments and the "
            f"images, or name another folder"
        )
    write_whole(str(path), json.dumps(settings).encode())


def _keys(sources: list[Source]) -> list[str]:
    """The samples' names in the tar: readers end a name at its first dot, so that dots in it become
    _.
    """
    known = {}
    for folder, stem in (os.path.split(os.path.splitext(source.name)[0]) for source in sources):
        key = f"{folder}/{stem.replace('.', '_')}"
        while key in known:  # of a.b.jpg and a_b.jpg, or a.jpg and a.png
            key += "_"
        if len(os.fsencode(folder)) > 155 or len(os.fsencode(key)) - len(os.fsencode(folder)) > 96:
            raise ValueError(
                f"{folder}/{stem}: a tar has room for 155 bytes of class and 95 of name: shorten it"
            )
        known[key] = None
    return list(known)


def _write_shard(
    path: Path, samples: list[tuple[str, int, Source]], resize: int, quality: int
) -> dict:
    """Write a shard, unless it is there; returns (offset, length) of its images and what was kept,
    as its sidecar.
    """
    sidecar, unfinished = path.with_name(f".{path.name}.json"), path.with_name(f"{path.name}.tmp")
    if path.exists():
        return json.loads(sidecar.read_text())
    written = {"places": [], "kept": []}
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, label, source in samples:
                data, suffix, reason = _smaller(source, resize, quality)
                written["kept"] += [(source.name, reason)] if reason else []
                written["places"].append((tar.offset + tarfile.BLOCKSIZE, len(data)))
                for name, content in (
                    (f"{key}.{suffix}", data),
                    (f"{key}.cls", str(label).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    write_whole(str(sidecar), json.dumps(written).encode())  # first, so that every shard has one
    os.replace(unfinished, path)
    return written


def _smaller(source: Source, resize: int, quality: int) -> tuple[bytes, str, str | None]:
    """(bytes, suffix, why they are the original ones although they should be smaller)."""
    data, suffix = source.read(), os.path.splitext(source.name)[1][1:].lower()
    reason = check(data) if resize or quality else None
    larger = not reason and 0 < resize < min(image_size(data))
    if reason or not (quality or larger):
        return data, suffix, reason
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):
                return data, suffix, "it has 16 bits, which Pillow would clip"
            smaller, buffer = image.convert("RGB"), io.BytesIO()
            if larger:
                size = [side * resize // min(image.size) for side in image.size]
                smaller = smaller.resize(size, Image.Resampling.LANCZOS)
            smaller.save(buffer, "JPEG", quality=quality or 90)
    except Exception as error:  # Pillow's plugins raise what they like
        return data, suffix, f"{type(error).__name__}: {error}"
    return (
        (buffer.getvalue(), "jpg", None)
        if larger or buffer.tell() < len(data)
        else (data, suffix, None)
    )
