"""The images that the decoder warns about, each named once.

A warning has no name and comes at some time while a batch is decoded. So the images of the last
portions are decoded again, each alone, until the ones that warn are known. That is done only when
there are more warnings than the known images explain, and ends after a limit.
"""

import warnings
from collections import deque

from resnet_dist.data.pixels.dali import Decoder, Portion
from resnet_dist.data.sources.index import Index
from resnet_dist.logs.decoder_warnings import DecoderWarnings
from resnet_dist.text import printable

_MOST_NAMED = 20
_MOST_PROBED = 20_000
_MOST_PORTIONS = 4


class WarnedImages:
    """Finds and names the images of an index that the decoder warns about."""

    def __init__(self, index: Index, decoder: Decoder, source: DecoderWarnings) -> None:
        """Begin without a known image."""
        self.index = index
        self.decoder = decoder
        self.source = source
        self.recent: deque[Portion] = deque(maxlen=_MOST_PORTIONS)
        self.named: set[int] = set()
        """rows that have been named"""
        self.probed: set[int] = set()
        """rows that were decoded alone"""
        self.unexplained = False

    def submitted(self, portion: Portion) -> None:
        """Take note of a portion that the decoder begins with."""
        self.recent.append(portion)

    def check(self) -> None:
        """Name the images of the last portions that the decoder has warned about since then."""
        texts = self.source.take()
        if not texts:
            return
        candidates = self._rows()
        num_known = len(self.named & candidates.keys())
        if len(texts) <= num_known or len(self.named) >= _MOST_NAMED:
            return
        num_before = len(self.named)
        for row, (portion, place) in candidates.items():
            if row in self.probed or len(self.probed) >= _MOST_PROBED:
                continue
            self.probed.add(row)
            self._probe(row, portion, place)
        if len(self.named) == num_before and num_known == 0 and not self.unexplained:
            self.unexplained = True
            warnings.warn(f"the decoder warns about an image: {printable(texts[0])}", stacklevel=2)

    def _rows(self) -> dict[int, tuple[Portion, int]]:
        """The rows of the last portions, with their places."""
        found = {}
        for portion in self.recent:
            for place in range(portion.start, portion.stop):
                row = portion.loaded.images[place].row
                found[row] = (portion, place)
        return found

    def _probe(self, row: int, portion: Portion, place: int) -> None:
        """Decode one image alone, and name it if the decoder warns."""
        alone = Portion(portion.loaded, place, place + 1)
        texts: list[str] = []
        # Twice: a portion under way may warn once at the same time.
        for _ in range(2):
            self.source.take_all()
            self.decoder.find_undecodable(alone)
            texts = self.source.take_all()
            if not texts:
                return
        if len(self.named) >= _MOST_NAMED:
            return
        self.named.add(row)
        more = ""
        if len(self.named) == _MOST_NAMED:
            more = "; further images are not named: `resnet-dist data verify` lists them"
        text = f"{self.index.path(row)}: {texts[0]}. The image is used as far as it can be decoded"
        warnings.warn(printable(text + more), stacklevel=2)
