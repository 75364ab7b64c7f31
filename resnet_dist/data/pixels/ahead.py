"""Batches made ahead of time: one background thread per iteration keeps a few of them ready."""

import contextlib
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from resnet_dist.data.pixels.finish import disable_openmp_in_thread
from resnet_dist.data.stores.client import give_up_soon
from resnet_dist.data.types import Batch


@dataclass(frozen=True)
class ReadyBatch:
    """A batch, and on a GPU the event after which its tensors are complete."""

    batch: Batch
    event: torch.cuda.Event | None = None


class _BackgroundError:
    """What the background thread of `run_ahead` raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def receive(ready: Generator[ReadyBatch, None, None]) -> Generator[Batch, None, None]:
    """Hand batches over to the caller's stream, which waits for them on the GPU alone.

    Args:
        ready: The batches; closing this generator closes them too.

    Yields:
        Each batch, in order.
    """
    with contextlib.closing(ready):
        for item in ready:
            if item.event is not None:
                _wait_on_stream(item.batch, item.event)
            handed_over = [item.batch]
            del item
            # The caller alone keeps the batch now, and frees it when it is done with it. Otherwise
            # that would happen here, when the next batch is asked for: to free a tensor gives up
            # Python's lock, which the loader's threads then take for some milliseconds.
            yield handed_over.pop()


def _wait_on_stream(batch: Batch, event: torch.cuda.Event) -> None:
    """Make the current stream wait until a batch is complete."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for tensor in (batch.images, batch.labels, *batch.other_views):
        # Its memory is not reused before the caller's stream is done with it.
        tensor.record_stream(stream)


def run_ahead(
    items: Generator[ReadyBatch, None, None], depth: int
) -> Generator[ReadyBatch, None, None]:
    """Yield `items`, computed in a background thread.

    What the thread raises is raised here. Closing this generator stops the thread, closes `items`
    and waits for both.

    Args:
        items: The batches.
        depth: Largest number of batches that the thread keeps ready, at least 1.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()
    thread = threading.Thread(
        target=_fill_queue,
        args=(items, ready, stopped),
        name="loader",
        daemon=True,
    )
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is _END:
                return
            if isinstance(item, _BackgroundError):
                raise item.error
            handed_over = [item]
            del item
            # Not kept here, as in `receive`.
            yield handed_over.pop()
    except KeyboardInterrupt:
        # The thread may be waiting for an object store that does not answer.
        give_up_soon()
        raise
    finally:
        stopped.set()
        thread.join()


def _fill_queue(
    items: Generator[ReadyBatch, None, None],
    ready: "queue.Queue[Any]",
    stopped: threading.Event,
) -> None:
    """Put `items` into a queue until they end or `stopped` is set: the work of the thread."""
    disable_openmp_in_thread()
    try:
        for item in items:
            if not _put(ready, item, stopped):
                break
        items.close()
        _put(ready, _END, stopped)
    except BaseException as error:
        _put(ready, _BackgroundError(error), stopped)


def _put(ready: "queue.Queue[Any]", item: object, stopped: threading.Event) -> bool:
    """Wait for room in a queue and put an item into it.

    Returns:
        False if `stopped` is set, so that nobody takes items any more.
    """
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
