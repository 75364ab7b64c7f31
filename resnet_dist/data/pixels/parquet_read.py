"""Reading the images of an evaluation set from the row groups of parquet files."""

import threading
from collections import OrderedDict

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.read import Encoded, Reader, ReadLimits, examine, read_limits
from resnet_dist.data.pixels.remote_read import build_reader
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.parquet import read_group
from resnet_dist.data.sources.val_index import is_parquet

_KEPT_GROUPS = 4
"""Row groups in memory: consecutive rows share one, and batches are read ahead."""


# Path of the file, and number of the row group in it.
_GroupKey = tuple[str, int]


class RowGroups:
    """The images of the row groups that were read last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: OrderedDict[_GroupKey, list[bytes]] = OrderedDict()

    def load(self, index: Index, row: int, limits: ReadLimits) -> Encoded:
        """Read and check the image of one row. It has the arguments of `read.load`.

        Raises:
            ValueError: if the row group is damaged.
        """
        path, number, place = index.place(row)
        images = self._images(path, number)
        return examine(row, images[place], limits)

    def _images(self, path: str, number: int) -> list[bytes]:
        """The images of a row group."""
        with self.lock:
            key = (path, number)
            if key not in self.kept:
                self.kept[key] = read_group(path, number)
            self.kept.move_to_end(key)
            while len(self.kept) > _KEPT_GROUPS:
                self.kept.popitem(last=False)
            return self.kept[key]


def open_reader(index: Index, config: DataConfig) -> Reader:
    """The reader of the images of an index.

    Args:
        index: the images.
        config: the `data` section of the config.
    """
    if not is_parquet(index):
        return build_reader(index, config)
    reader = Reader(index, limits=read_limits(config))
    reader.load = RowGroups().load
    return reader
