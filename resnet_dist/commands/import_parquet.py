"""`resnet-dist data import-parquet`: the parquet files of a data set to tar shards."""

import argparse
import functools
import os

from resnet_dist.data.sources.pack import PackOptions
from resnet_dist.data.sources.pack_stream import StreamedShard, chain, pack_streamed
from resnet_dist.data.sources.parquet import (
    ParquetOptions,
    ParquetSplit,
    RowGroup,
    find_parquet_files,
    open_parquet,
    read_class_names,
)


def run(args: argparse.Namespace) -> int:
    """Import the parquet files in args.src.

    Raises:
        ValueError: if there are none, or one of them is damaged or has another schema.
    """
    import_folder(args.src, args)
    return 0


def import_folder(folder: str, args: argparse.Namespace) -> None:
    """Write shards of the parquet files in `folder` to args.out, and say what was written.

    Raises:
        ValueError: if there are none, or one of them is damaged or has another schema.
    """
    class_names = read_class_names(args.class_names) if args.class_names else ()
    options = ParquetOptions(args.image_column, args.label_column, class_names)
    files = _find_splits(folder, args.val_split)
    # All labels and names are checked before the first shard is written.
    splits = {}
    for split, paths in files.items():
        splits[split] = open_parquet(paths, options)
    packing = PackOptions(
        out=args.out,
        shard_mb=args.shard_mb,
        workers=args.workers,
        resize=args.resize,
        quality=args.quality,
        check=True,
    )
    for split, parquet in splits.items():
        print(import_split(parquet, split, packing))


def _find_splits(folder: str, val_split: str) -> dict[str, list[str]]:
    """The parquet files of each split that there is.

    Args:
        folder: the folder to look in.
        val_split: the name of the split for evaluation; "" for the usual names.

    Raises:
        ValueError: if there are none.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder: name the one that holds the parquet files")
    found = {}
    for split, name in (("train", "train"), ("val", val_split or "val")):
        paths = find_parquet_files(folder, name)
        if paths:
            found[split] = paths
    if val_split and "val" not in found:
        raise ValueError(f"{folder} holds no parquet file of the split {val_split}: check its name")
    if "val" not in found and find_parquet_files(folder, "test"):
        raise ValueError(
            f"{folder} holds no validation set, but files of a split test: import it as the "
            f"validation set with --val_split test"
        )
    if not found:
        raise ValueError(
            f"{folder} holds no parquet files of a training or validation set: it needs files such "
            f"as train-00000-of-00294.parquet and validation-00000-of-00014.parquet, in it or in "
            f"its folder data/, or folders train/ and val/ with parquet files"
        )
    return found


def import_split(parquet: ParquetSplit, split: str, options: PackOptions) -> str:
    """Write shards of the rows of a split. Returns a summary of several lines."""
    # A dictionary removes repeated paths and keeps their order.
    paths = dict.fromkeys(group.path for group in parquet.groups)
    origin = []
    for path in paths:
        name = os.path.basename(path)
        size = os.path.getsize(path)
        origin.append(f"{name}: {size} bytes")
    shards = divide(parquet, options.shard_mb << 20)
    classes = list(parquet.class_names)
    return pack_streamed(shards, classes, split, options, "\n".join(origin))


def divide(parquet: ParquetSplit, shard_bytes: int) -> list[StreamedShard]:
    """Divide the rows into shards of about `shard_bytes` bytes, each of whole row groups.

    The division follows from the headers of the files alone, so that a repeated call divides alike.
    """
    pieces: list[list[RowGroup]] = []
    room = 0
    for group in parquet.groups:
        if not pieces or group.num_bytes > room:
            pieces.append([])
            room = shard_bytes
        pieces[-1].append(group)
        room -= group.num_bytes

    shards = []
    start = 0
    for groups in pieces:
        stop = start + sum(group.num_rows for group in groups)
        openers = [functools.partial(parquet.images, group) for group in groups]
        names = parquet.names[start:stop]
        labels = parquet.labels[start:stop].tolist()
        shards.append(StreamedShard(names, labels, chain(openers)))
        start = stop
    return shards
