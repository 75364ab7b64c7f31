"""Our loader on further data roots, for `resnet-dist benchmark loader --also ROOT,...`.

A root with class folders or tar shards, on a disk or in an object store, is read as in training.
Parquet files cannot be read in random order, so they are read as in evaluation: in their order, and
with the central crop. Evaluation of `data.data_dir` is measured then too, for comparison.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from resnet_dist.commands.benchmark_parts import split_names
from resnet_dist.commands.plain_loaders import MakeBatches
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_index, build_train_loader, build_val_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.val_index import build_val_index, parquet_to_evaluate
from resnet_dist.distributed.runtime import Runtime


def open_places(
    config: Config, runtime: Runtime, text: str, opened: ExitStack
) -> dict[str, MakeBatches]:
    """Open the loaders of the roots that `--also` names.

    Args:
        config: the settings; `train.global_batch_size` is the batch that is measured.
        runtime: a single process.
        text: the value of the option; may be empty.
        opened: closes the loaders.

    Returns:
        A function for each row of the table, by name, that yields the batches [start, stop).

    Raises:
        ValueError: if a root cannot be used.
    """
    makers: dict[str, MakeBatches] = {}
    parquet = {}
    for root in split_names(text):
        try:
            if parquet_to_evaluate(root, "train"):
                parquet[root] = build_val_index(root, "train", runtime)
            else:
                makers[root] = _training(config, runtime, root, opened)
        except ValueError as problem:
            raise ValueError(f"--also {root}: {problem}") from problem
    if parquet:
        own_index = build_train_index(config.data, runtime)
        makers["evaluation"] = _evaluation(config, runtime, own_index, opened)
    for root, index in parquet.items():
        makers[f"evaluation, {root}"] = _evaluation(config, runtime, index, opened)
    return makers


def _training(config: Config, runtime: Runtime, root: str, opened: ExitStack) -> MakeBatches:
    """The training set of a root, in random order."""
    data = replace(config.data, data_dir=root)
    loader = build_train_loader(replace(config, data=data), runtime)
    opened.callback(loader.close)
    assert isinstance(loader, DaliTrainLoader)
    return loader.batches


def _evaluation(config: Config, runtime: Runtime, index: Index, opened: ExitStack) -> MakeBatches:
    """Training images, in their order and with the pixels of evaluation."""
    local_batch_size = config.train.global_batch_size
    data = replace(config.data, val_batch_size=local_batch_size)
    loader = build_val_loader(replace(config, data=data), runtime, index=index)
    opened.callback(loader.close)
    assert isinstance(loader, DaliValLoader)

    def batches(start: int, stop: int) -> Iterator[Any]:
        jobs = []
        for number in range(start, stop):
            first = number * local_batch_size
            positions = np.arange(first, first + local_batch_size)
            # After the last image comes the first one again.
            rows = positions % len(index)
            jobs.append(val_job(rows))
        return loader.run(jobs)

    return batches
