"""Cheap checks of an image file in memory, and the slow way through Pillow for those that need it.

A broken image stops a whole batch inside the decoder, often without a name. So a few microseconds
go into each file first: is it a JPEG or PNG, what size does its header give, is its end marker
there. A file of another format, or without its end marker, is decoded by Pillow at once, and
Pillow's verdict counts on every device: a decoder on a GPU does not fail on a truncated file.
"""

import io
import struct
from typing import TYPE_CHECKING, NamedTuple

from resnet_dist.config import DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

_PNG_START = b"\x89PNG\r\n\x1a\n"
# The name of the last chunk and its checksum.
_PNG_END = b"IEND\xaeB`\x82"
_PNG_HEADER_BYTES = 33
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
# The marker (0xFF and its code) and the length of a segment.
_JPEG_SEGMENT = struct.Struct(">BBH")
# Height and width, in the segment of a frame.
_JPEG_SIZE = struct.Struct(">HH")
_JPEG_SIZE_OFFSET = 5
_JPEG_SCAN = 0xDA
_JPEG_END_CODE = 0xD9
_JPEG_LAST = (_JPEG_SCAN, _JPEG_END_CODE)
# A marker may have any number of these bytes before it.
_JPEG_FILL = 0xFF
_DAMAGED_JPEG = "the JPEG header is damaged or cut off"
# JPEG markers without a length: TEM, RST0 to RST7.
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])
# SOF0 to SOF15, without DHT, JPG and DAC, which lie between them.
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Largest ratio of the longer to the shorter side.
_LONGEST = 200
# Formats that Pillow may decode. Others are not tried: EPS, for one, starts another program.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


class Header(NamedTuple):
    """What the beginning of a JPEG or PNG file says."""

    height: int
    width: int
    picture_start: int
    """position behind the header"""
    end_marker: bytes


class Inspection(NamedTuple):
    """What a look at a file's header and end has found."""

    height: int
    width: int
    suspicion: str | None
    """why Pillow has to decode the file before it can be used; None for a good JPEG or PNG"""


class Decoded(NamedTuple):
    """An image that Pillow has decoded."""

    data: bytes
    """as an uncompressed PNG file, which the training decoder reads"""
    height: int
    width: int


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header alone; an EXIF orientation is ignored, as in decoding.

    Raises ValueError with the reason if there is no header that can be read.
    """
    if _is_foreign(data):
        with _open_with_pillow(data) as image:
            width, height = image.size
            return height, width
    header = _read_header(data)
    return header.height, header.width


def find_fault(data: bytes, max_pixels: int = DataConfig.max_pixels) -> str | None:
    """What is wrong with an image file, or None.

    Damage inside of the picture of a JPEG or PNG is not looked for: the decoder finds it.
    """
    try:
        inspection = inspect(data, max_pixels)
        if inspection.suspicion:
            decode_with_pillow(data, inspection.suspicion, max_pixels)
    except ValueError as error:
        return str(error)
    return None


def inspect(data: bytes, max_pixels: int) -> Inspection:
    """Look at a file's header and end. Raises ValueError with the reason if it is of no use."""
    if _is_foreign(data):
        return Inspection(0, 0, f"neither JPEG nor PNG: the file starts with {data[:8]!r}")
    height, width, picture_start, end_marker = _read_header(data)
    _check_size(height, width, max_pixels)
    # Entropy-coded data cannot contain JPEG's end marker, so one after the start of the first scan
    # is the real one, whatever cameras and editors append to the file.
    if data.rfind(end_marker, picture_start) < 0:
        return Inspection(height, width, "the file is cut off: its end marker is missing")
    return Inspection(height, width, None)


def decode_with_pillow(data: bytes, suspicion: str, max_pixels: int) -> Decoded:
    """Decode a file whole, as torchvision's ImageFolder does.

    Raises ValueError with `suspicion` and Pillow's reason if that fails.
    """
    try:
        with _open_with_pillow(data) as image:
            width, height = image.size
            _check_size(height, width, max_pixels)
            pixels = image.convert("RGB")
    # Pillow's plugins raise many types, SyntaxError and struct.error among them.
    except Exception as error:
        raise ValueError(f"{suspicion}; Pillow: {error or type(error).__name__}") from None
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", compress_level=0)
    return Decoded(buffer.getvalue(), height, width)


def _open_with_pillow(data: bytes) -> "PillowImage":
    """Pillow's image, of which only the header has been read. Raises ValueError."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("it knows no such format") from None
    except Exception as error:
        raise ValueError(str(error)) from None


def _is_foreign(data: bytes) -> bool:
    """Whether a file has bytes, but neither those of a JPEG nor those of a PNG."""
    if not data:
        return False
    return not data.startswith((_JPEG_START, _PNG_START))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise ValueError for a size that is damage, or that would take too much memory."""
    if height <= 0 or width <= 0:
        raise ValueError(f"the header gives a size of {width} x {height}")
    if height * width > max_pixels:
        raise ValueError(
            f"it is {width} x {height}, which is more than data.max_pixels = {max_pixels}"
        )
    shorter, longer = sorted((height, width))
    if longer > _LONGEST * shorter:
        raise ValueError(
            f"it is {width} x {height}: resized by its shorter side it would take gigabytes"
        )


def _read_header(data: bytes) -> Header:
    """The header of a JPEG or PNG. Raises ValueError if it is damaged."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_PNG_START):
        if len(data) < _PNG_HEADER_BYTES or data[12:16] != b"IHDR":
            raise ValueError("the PNG header is damaged")
        width, height = struct.unpack_from(">II", data, 16)
        return Header(height, width, _PNG_HEADER_BYTES, _PNG_END)
    return _read_jpeg_header(data)


def _read_jpeg_header(data: bytes) -> Header:
    """The header of a JPEG. Raises ValueError if it is damaged."""
    try:
        return _follow_segments(data)
    except struct.error:
        # A segment lies behind the end of the file.
        raise ValueError(_DAMAGED_JPEG) from None


def _follow_segments(data: bytes) -> Header:
    """Go from segment to segment of a JPEG, up to its first scan.

    Raises:
        ValueError: If the header is damaged.
        struct.error: If the file ends before the first scan.
    """
    position = 2
    size: tuple[int, int] | None = None
    while True:
        first_byte, marker, length = _JPEG_SEGMENT.unpack_from(data, position)
        if first_byte != 0xFF:
            raise ValueError(_DAMAGED_JPEG)
        if marker == _JPEG_FILL:
            position += 1
            continue
        if marker in _JPEG_LAST:
            if size is None or marker == _JPEG_END_CODE:
                raise ValueError("the JPEG header gives no size")
            height, width = size
            return Header(height, width, position, _JPEG_END)
        if marker in _FRAME:
            size_of_frame = _JPEG_SIZE.unpack_from(data, position + _JPEG_SIZE_OFFSET)
            size = size or size_of_frame
        # Behind the two bytes of the marker.
        position += 2
        if marker not in _STANDALONE:
            position += length
