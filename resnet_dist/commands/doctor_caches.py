"""The check of `resnet-dist doctor` whether the caches of decoded images have room."""

import shutil
import tempfile

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_train_index, build_val_loader
from resnet_dist.data.pixels.cache_fill import cache_budget, estimate_cache_bytes
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.text import memory_size


def check_caches(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether the images that `data.train_cache` and `data.val_cache` keep have room.

    Returns:
        "ok", "warning" or "error", and a sentence.
    """
    data = config.data
    if data.kind == "synthetic":
        return "ok", "synthetic data: nothing to keep in memory"
    level = "ok"
    texts = []
    if data.train_cache != "off":
        level, text = _check_train_cache(data, runtime)
        texts.append(text)
    if data.val_cache != "off":
        text = _describe_val_cache(config, runtime)
        texts.append(text)
    if not texts:
        return "ok", "data.train_cache and data.val_cache are off"
    return level, "; ".join(texts)


def _check_train_cache(data: DataConfig, runtime: Runtime) -> tuple[str, str]:
    """Whether the training images fit into the memory and the temporary folder of this machine."""
    index = build_train_index(data, runtime)
    needed = estimate_cache_bytes(index, data)
    memory = cache_budget()
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    text = (
        f"data.train_cache {data.train_cache}: "
        f"the training images take about {memory_size(needed)}; "
        f"the cache may take {memory_size(memory)} of memory, and "
        f"{memory_size(disk.free)} are free in {folder} (TMPDIR)"
    )
    if needed <= min(memory, disk.free):
        return "ok", text
    if data.train_cache == "auto":
        return "warning", f"{text}: it will be off"
    return "error", f"{text}: take --data.train_cache off, or smaller images"


def _describe_val_cache(config: Config, runtime: Runtime) -> str:
    """What the validation cache will do. It is off where there is no room, which stops no run."""
    loader = build_val_loader(config, runtime, cached=True)
    remarks = loader.remarks()
    loader.close()
    for remark in remarks:
        if remark.startswith("validation cache: "):
            return remark
    return "the validation images fit into memory (data.val_cache)"
