"""Encoded images: what they are, by their bytes and not by their name, what they show, and re-encoding with Pillow."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

DEFAULT_QUALITY = 90
# Above this an image is taken for a decompression bomb. It is the size at which Pillow refuses to decode.
MAX_PIXELS = 178_956_970
MAX_SIDE = 65_535
# A frame as it is stored and decoded again and again, a whole batch of them at once; one of 8K video is just below.
MAX_FRAME_PIXELS = 1 << 25

_JPEG_END = b"\xff\xd9"
_NO_HEAD = b"no image begins like this"
_PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class ImageInfo(NamedTuple):
    """extension: jpg, png, webp or bmp. width and height in pixels, as stored (EXIF orientation is not applied)."""

    extension: str
    width: int
    height: int


def probe_image(data: bytes) -> ImageInfo:
    """Kind and size of an encoded image from its header; nothing is decoded.

    Raises ValueError when the bytes are empty, of another kind, cut off, or beyond the limits on the size.
    """
    return _probe(data)[0]


class ImageProbe:
    """`probe_image` for the frames of one video, which mostly share their header: it is parsed once."""

    def __init__(self) -> None:
        self._head = _NO_HEAD
        self._info = ImageInfo("", 0, 0)

    def __call__(self, data: bytes) -> ImageInfo:
        if not (data.startswith(self._head) and data.endswith(_JPEG_END)):
            self._info, head_bytes = _probe(data)
            self._head = data[:head_bytes] if head_bytes else _NO_HEAD
        return self._info


def _probe(data: bytes) -> tuple[ImageInfo, int]:
    """Kind and size, and for a JPEG the number of bytes from its beginning that they follow from (else 0)."""
    head_bytes = 0
    if not data:
        raise ValueError("the file is empty")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            width, height, head_bytes = _jpeg_size(data)
            info = ImageInfo("jpg", width, height)
        elif data.startswith(_PNG_BEGIN):
            info = ImageInfo("png", *_png_size(data))
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            info = ImageInfo("webp", *_webp_size(data))
        elif data.startswith(b"BM"):
            info = ImageInfo("bmp", *_bmp_size(data))
        else:
            raise ValueError(f"the file is no JPEG, PNG, WebP or BMP image (it begins with {data[:4].hex(' ')})")
    except IndexError:
        raise ValueError("the image is cut off in its header") from None
    if not 0 < info.width <= MAX_SIDE or not 0 < info.height <= MAX_SIDE or info.width * info.height > MAX_PIXELS:
        raise ValueError(
            f"the image is {info.width}x{info.height} pixels; the limits are {MAX_SIDE} a side, {MAX_PIXELS} in all"
        )
    return info, head_bytes


def read_image(data: bytes) -> Image.Image:
    """The image as RGB. Raises ValueError for what `probe_image` refuses, and when it does not decode.

    Grey, palette and CMYK become what Pillow's `convert("RGB")` shows, transparency is dropped, and of 16 bits the
    upper eight count: Pillow would make grey of 16 bits white. The EXIF orientation is not applied, as the field's
    loaders do not.
    """
    probe_image(data)
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            if image.mode.startswith("I"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            image.info.pop("transparency", None)  # of palettes Pillow would warn
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image does not decode ({error})") from error


def plain_image(data: bytes) -> bytes:
    """An image that every decoder turns into the pixels of `read_image`.

    Kinds that decoders round differently, or that not all of them know, become a BMP of 24 bits; others stay unchanged.

    Raises ValueError when such an image does not decode.
    """
    deep_png = data.startswith(_PNG_BEGIN) and data[24:25] == b"\x10"
    odd_bmp = data.startswith(b"BM") and data[28:34] != b"\x18\0\0\0\0\0"  # other than 24 bits, not compressed
    if not deep_png and not odd_bmp:
        return data
    stream = io.BytesIO()
    read_image(data).save(stream, "BMP")
    return stream.getvalue()


def reencode(data: bytes, short_side: int | None, quality: int | None) -> bytes:
    """Decodes an image and encodes it as JPEG, see `encode_jpeg`. Raises ValueError when it does not decode."""
    return encode_jpeg(read_image(data), short_side, quality)


def encode_jpeg(image: Image.Image | np.ndarray, short_side: int | None, quality: int | None) -> bytes:
    """JPEG of an RGB image, or an array (H, W, 3) uint8, its shorter side scaled down to `short_side` pixels.

    Scaling is bicubic with antialias. An image that is already smaller keeps its size: enlarging costs bytes and adds
    nothing. EXIF tags are dropped. quality: 90 by default.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    size = scaled_down(image.width, image.height, short_side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=DEFAULT_QUALITY if quality is None else quality, exif=b"")
    return stream.getvalue()


def scaled_down(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height when the shorter one is at most `short_side` pixels; those given if it is already."""
    if short_side is None or min(width, height) <= short_side:
        return width, height
    scale = short_side / min(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def check_decodes(data: bytes) -> None:
    """Decodes every pixel of an image. Raises ValueError when it does not decode.

    Decoders fill up a JPEG whose data end too early with grey and only warn of it: here that is an error too.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            image.load()
            if image.format == "JPEG":
                _check_jpeg_data(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image does not decode ({error})") from error


def _check_jpeg_data(data: bytes) -> None:
    """Raises ValueError for what libjpeg only warns of, except harmless extra bytes, which some cameras write."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    except ValueError as warning:
        if "extraneous bytes" not in str(warning):
            raise


def _jpeg_size(data: bytes) -> tuple[int, int, int]:
    """Width, height, and where the frame header (SOF) that tells them ends; makes sure that the image has an end."""
    position = 2
    size: tuple[int, int, int] | None = None
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"the JPEG header is damaged at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        if marker == 0xDA:  # start of scan: the pixels follow
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = (data[position + 5] << 8) | data[position + 6]
            size = (data[position + 7] << 8) | data[position + 8], height, position + 2 + length
            if data.endswith(_JPEG_END):
                return size
        position += 2 + length
    if size is None:
        raise ValueError("the JPEG has no frame header")
    # Bytes may follow the end of the image; between the scan and the end no such marker can be.
    if data.find(_JPEG_END, position) < 0:
        raise ValueError("the JPEG is cut off: it has no end marker")
    return size


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise ValueError("the PNG has no header chunk")
    if not data.endswith(_PNG_END) and _PNG_END not in data:
        raise ValueError("the PNG is cut off: it has no end chunk")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _webp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 30 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ValueError("the WebP is cut off: it is shorter than its header says")
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise ValueError(f"the WebP has an unknown first chunk {kind!r}")


def _bmp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 26 or len(data) < int.from_bytes(data[2:6], "little"):
        raise ValueError("the BMP is cut off: it is shorter than its header says")
    if int.from_bytes(data[14:18], "little") == 12:
        return int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    # A negative height means that the rows run from the top.
    return (
        int.from_bytes(data[18:22], "little", signed=True),
        abs(int.from_bytes(data[22:26], "little", signed=True)),
    )
