"""The images that the decoder warns about, each named once.

A warning has no name and comes at some time while a batch is decoded. So the images of the last
portions are decoded again, each alone, until the ones that warn are known. That is done only when
there are more warnings than the known images explain, and ends after a limit.
"""

import warnings
from collections import deque
from dataclasses import dataclass

from resnet_dist.data.pixels.dali import Decoder, Portion
from resnet_dist.data.sources.index import Index
from resnet_dist.logs.decoder_warnings import DecoderWarnings
from resnet_dist.text import printable

_MOST_NAMED = 20
_MOST_PROBED = 20_000
_MOST_PORTIONS = 4

# A portion under way may warn once at the same time as an image that is decoded alone.
_TIMES_PROBED = 2


@dataclass(frozen=True)
class _PlacedImage:
    """An image of a portion that was decoded lately."""

    row: int
    """row of the index"""
    portion: Portion
    place: int
    """its place in the job of the portion"""

    def alone(self) -> Portion:
        """A portion with this image only."""
        return Portion(self.portion.loaded, self.place, self.place + 1)


class WarnedImages:
    """Finds and names the images of an index that the decoder warns about."""

    def __init__(self, index: Index, decoder: Decoder, source: DecoderWarnings) -> None:
        """Begin without a known image.

        Args:
            index: The images.
            decoder: Decodes them.
            source: Has the warnings of the decoder.
        """
        self.index = index
        self.decoder = decoder
        self.source = source
        self.recent: deque[Portion] = deque(maxlen=_MOST_PORTIONS)
        self.named: set[int] = set()
        """rows that have been named"""
        self.probed: set[int] = set()
        """rows that were decoded alone"""
        self.has_said_unexplained = False

    def submitted(self, portion: Portion) -> None:
        """Take note of a portion that the decoder begins with."""
        self.recent.append(portion)

    def check(self) -> None:
        """Name the images of the last portions that the decoder has warned about since then."""
        texts = self.source.take()
        if not texts:
            return
        candidates = self._candidates()
        num_known = len(self.named & candidates.keys())
        # An image that is known may warn again.
        is_explained = len(texts) <= num_known
        if is_explained or self._is_full:
            return
        num_new = 0
        for image in candidates.values():
            num_new += self._probe_once(image)
        if num_new == 0 and num_known == 0:
            self._say_unexplained(texts[0])

    @property
    def _is_full(self) -> bool:
        """Whether no further image is named."""
        return len(self.named) >= _MOST_NAMED

    def _candidates(self) -> dict[int, _PlacedImage]:
        """The images of the last portions, by row."""
        found = {}
        for portion in self.recent:
            for place in range(portion.start, portion.stop):
                row = portion.loaded.images[place].row
                found[row] = _PlacedImage(row, portion, place)
        return found

    def _probe_once(self, image: _PlacedImage) -> int:
        """Decode an image alone if that was not done before, and name it if the decoder warns.

        Returns:
            The number of images that were named, 0 or 1.
        """
        has_probed_enough = len(self.probed) >= _MOST_PROBED
        if image.row in self.probed or has_probed_enough or self._is_full:
            return 0
        self.probed.add(image.row)
        text = self._warning_of(image)
        if text is None:
            return 0
        self._name(image.row, text)
        return 1

    def _warning_of(self, image: _PlacedImage) -> str | None:
        """What the decoder says about an image alone; None if it does not warn."""
        alone = image.alone()
        texts: list[str] = []
        for _ in range(_TIMES_PROBED):
            self.source.take_all()
            self.decoder.find_undecodable(alone)
            texts = self.source.take_all()
            if not texts:
                return None
        return texts[0]

    def _name(self, row: int, text: str) -> None:
        """Warn about an image.

        Args:
            row: The row of the image.
            text: What the decoder says about it.
        """
        self.named.add(row)
        message = f"{self.index.path(row)}: {text}. The image is used as far as it can be decoded"
        if self._is_full:
            message += "; further images are not named: `resnet-dist data verify` lists them"
        warnings.warn(printable(message), stacklevel=2)

    def _say_unexplained(self, text: str) -> None:
        """Say once that the decoder warns about an image that was not found."""
        if self.has_said_unexplained:
            return
        self.has_said_unexplained = True
        warnings.warn(f"the decoder warns about an image: {printable(text)}", stacklevel=2)
