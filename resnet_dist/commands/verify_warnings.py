"""The images of `resnet-dist data verify` that the decoder of training prints a warning about.

A warning has no name, and several threads decode at the same time. So the groups of images that
were under way when a warning came are kept, and their images are decoded again afterwards, each
alone.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from resnet_dist.logs.decoder_warnings import DecoderWarnings

Group = TypeVar("Group")
Image = TypeVar("Image")


class GroupsWithWarnings(Generic[Group]):
    """Collects the groups of images that were being decoded when a warning came.

    Args:
        source: The warnings; None where they cannot be collected.
    """

    def __init__(self, source: DecoderWarnings | None) -> None:
        self.found: list[Group] = []
        """each group once"""
        self._source = source
        self._under_way: list[Group] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watch(self, group: Group) -> Iterator[None]:
        """The images of a group are decoded inside this block, by the current thread."""
        if self._source is None:
            yield
            return
        with self._lock:
            self._under_way.append(group)
        try:
            yield
        finally:
            with self._lock:
                if self._source.take_all():
                    self.found += [one for one in self._under_way if one not in self.found]
                self._under_way.remove(group)


def find_warnings(
    images: list[Image], decode: Callable[[Image], None], source: DecoderWarnings
) -> list[tuple[Image, str]]:
    """Decode images one after the other, while no other thread decodes.

    Args:
        images: The images.
        decode: Decodes one image.
        source: The warnings.

    Returns:
        The images that the decoder warns about, each with its first warning.
    """
    found = []
    source.take_all()
    for image in images:
        decode(image)
        texts = source.take_all()
        if texts:
            found.append((image, texts[0]))
    return found
