"""Loaders of other projects, for `resnet-dist benchmark loader --rivals FILE[:NAME,...]`.

They live in a Python file outside of the package, such as benchmarks/rivals.py in the repository,
which defines `RIVALS`: a dict from the name of a loader to its `BuildLoader`. A loader whose
library cannot be imported is left out, unless its name was given.
"""

import os
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field

from resnet_dist.commands.benchmark_parts import split_names
from resnet_dist.commands.plain_loaders import MakeBatches
from resnet_dist.config import DataConfig

BuildLoader = Callable[[str, DataConfig, int, int], MakeBatches]
"""From (folder with class folders, config, local batch size, number of threads) to a loader."""


@dataclass
class RivalLoaders:
    """The loaders of a file of rivals."""

    makers: dict[str, MakeBatches] = field(default_factory=dict)
    """those that can be used, by name"""
    left_out: dict[str, str] = field(default_factory=dict)
    """why others cannot be used, by name"""


def build_rivals(
    text: str, folder: str, config: DataConfig, local_batch_size: int, threads: int
) -> RivalLoaders:
    """Build the loaders that `--rivals` names.

    Args:
        text: FILE or FILE:NAME,...; without names, all that can be imported.
        folder: The folder with the class folders.
        config: The random crop and its size.
        local_batch_size: Images of a batch.
        threads: Number of our threads, or of their worker processes.

    Raises:
        ValueError: The file or a loader that was named cannot be used.
    """
    path, _, names_text = text.partition(":")
    builders = _read_builders(path)
    wanted = split_names(names_text)
    for name in wanted:
        if name not in builders:
            raise ValueError(f"--rivals has {name!r}: {path} has {', '.join(builders)}")

    found = RivalLoaders()
    for name in wanted or builders:
        try:
            found.makers[name] = builders[name](folder, config, local_batch_size, threads)
        except ImportError as problem:
            if wanted:
                raise ValueError(
                    f"--rivals {text}: {name} cannot be imported ({problem}): install it, or leave "
                    f"its name out"
                ) from problem
            found.left_out[name] = str(problem)
    return found


def _read_builders(path: str) -> dict[str, BuildLoader]:
    """The `RIVALS` of a file. Raises ValueError if there are none."""
    if not os.path.isfile(path):
        raise ValueError(
            f"--rivals names {path!r}, which is no file: the repository has benchmarks/rivals.py"
        )
    try:
        definitions = runpy.run_path(path)
    except SyntaxError as problem:
        raise ValueError(f"--rivals: {path} is not valid Python: {problem}") from problem
    builders = definitions.get("RIVALS")
    if not isinstance(builders, dict):
        raise ValueError(
            f"--rivals: {path} does not define RIVALS, a dict from names to functions such as "
            f"those of benchmarks/rivals.py"
        )
    return builders
