"""Read, resize, colour and write images. The one place where a file becomes RGB uint8."""

import base64
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFile, ImageFont, PngImagePlugin, UnidentifiedImageError

from kizu.data import decoders, files
from kizu.errors import BadImage

__all__ = ["MAX_LARGE_PIXELS", "MAX_PIXELS", "MIN_SIDE", "RGB", "SUFFIXES", "WHITE", "Float", "Source", "data_uri"]
__all__ += [
    "encode",
    "framed",
    "from_data_uri",
    "give_back_large",
    "heat",
    "highest",
    "is_marked",
    "name_of",
    "opened",
    "outline",
    "overlay",
    "read",
    "read_at_least",
    "resize",
    "resize_map",
    "size_of",
    "small",
    "suffix_of",
    "taken_at",
    "write",
    "write_map",
    "write_picture",
]

Source = str | os.PathLike[str] | bytes | npt.NDArray[Any] | Image.Image
RGB = npt.NDArray[np.uint8]  # (H, W, 3)
Float = npt.NDArray[np.float32]

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga"}
_ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "BMP": ".bmp", "DIB": ".dib", "TIFF": ".tif", "WEBP": ".webp"}
_ENDINGS |= {"GIF": ".gif", "PPM": ".ppm", "JPEG2000": ".jp2", "AVIF": ".avif", "TGA": ".tga"}
MIN_SIDE = 8
SMALL_SIDE = 400  # pixels of the longer side of a picture on a page
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MARK = "kizu picture"
MARK_WITHIN = 128  # bytes from the start of a file
EXIF_ORIENTATION = 0x0112  # 5 to 8: turned by a quarter
EXIF_DETAILS, EXIF_TAKEN, EXIF_FRACTION = 0x8769, 0x9003, 0x9291  # a table; in it the time and parts of its second
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = decoders.USUAL_LIMIT
MAX_LARGE_PIXELS = 2**28  # of a photograph that is seen in tiles, such as a strip of 4,000 × 60,000
BAND = 2**22  # pixels that are converted at a time
WHITE = 65535  # the largest value of 16 bits
STUCK = 1e-4  # share of a camera's pixels that may always be white
TOO_BRIGHT = 0.05  # share of the pixels above white: with fewer it is a glare, with more another camera setting
MAX_FILE_BYTES = 2 * 10**9  # more than the largest image takes that is not compressed
MAPPED_BLOCK = 2**26  # bytes; the C library takes so much from the system each time, and gives it back

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # remarks on metadata that nobody needs
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damage it raises too
warnings.simplefilter("error", Image.DecompressionBombWarning)


def read(source: Source, white: int = WHITE, *, large: bool = False) -> RGB:
    """Turn a file, encoded bytes, array, tensor (C, H, W) or PIL image into RGB uint8 of shape (H, W, 3).

    EXIF orientation is applied, alpha dropped, grey repeated over the channels, CMYK and palettes converted.
    Values of more than 8 bits are divided by what makes `white` 255, floats in [0, 1] multiplied by 255.

    Raises `BadImage` when it is broken, empty, smaller than 8 × 8 or larger than `MAX_PIXELS`; of one that may be
    `large`, than `MAX_LARGE_PIXELS`, and no side is too short. While it is decoded, a pixel takes 7 bytes of memory,
    afterwards 3.
    """
    return read_at_least(source, white=white, large=large)[0]


def read_at_least(
    source: Source, size: tuple[int, int] | None = None, white: int = WHITE, *, large: bool = False
) -> tuple[RGB, tuple[int, int]]:
    """As `read`, and the photograph's own (height, width).

    A JPEG much larger than `size` is decoded at a half, a quarter or an eighth of its size, never below `size`.
    """
    name = name_of(source)
    source = _known(source, name)
    if isinstance(source, np.ndarray):
        rgb = _from_array(source, name, white, large)
        return rgb, (rgb.shape[0], rgb.shape[1])
    with _open(source, name, large) as image, _decoding(name):
        shape = image.height, image.width
        if _orientation(image) >= 5:
            shape = shape[1], shape[0]
        if size is not None and isinstance(image, ImageFile.ImageFile):
            image.draft(None, (max(size), max(size)))  # square: EXIF may yet turn it
        return np.ascontiguousarray(_to_rgb(image, name, white, large)), shape


def highest(source: Source) -> int | None:
    """The largest value of an image whose values have more than 8 bits, stuck pixels aside; None for any other.

    Raises `BadImage` for one that is broken.
    """
    name = name_of(source)
    source = _known(source, name)
    if isinstance(source, np.ndarray):
        return _highest(source) if source.dtype.kind in "ui" and source.dtype.itemsize > 1 and source.size else None
    with _open(source, name, large=True) as image, _decoding(name):
        return _highest(np.asarray(image)) if image.mode.startswith("I") else None


def _highest(values: npt.NDArray[Any]) -> int:
    place = int((1 - STUCK) * (values.size - 1))
    return int(np.partition(values, place, axis=None)[place])


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """A file or encoded bytes as a PIL image. Whatever is wrong with it, at once or while it is read, is `BadImage`."""
    name = name_of(source)
    with _open(source, name) as image, _decoding(name):
        yield image


def size_of(source: Source, *, large: bool = False) -> tuple[int, int]:
    """Height and width as stored (before EXIF rotation), from the header alone where there is one."""
    if isinstance(source, np.ndarray):
        return int(source.shape[0]), int(source.shape[1])
    with _open(source, name_of(source), large) as image:
        return image.height, image.width


def taken_at(source: Source) -> str | None:
    """When a photograph was taken, by its EXIF data: text that sorts by time. None where they do not say."""
    try:
        with _open(source, name_of(source), large=True) as image:
            exif = image.getexif().get_ifd(EXIF_DETAILS)
            when, fraction = exif.get(EXIF_TAKEN), exif.get(EXIF_FRACTION, "")
    except Exception:  # of whatever the bytes are
        return None
    return f"{when}.{fraction}" if isinstance(when, str) and when[:4].isdecimal() else None


def suffix_of(source: Source) -> str | None:
    """How the name of a file with this content ends; None for a format that is not among `SUFFIXES`."""
    with _open(source, name_of(source), large=True) as image:
        return _ENDINGS.get(image.format or "")


def name_of(source: Source) -> str:
    """What to call an image in a message."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "image"
    return "image"


def give_back_large() -> None:
    """Have Pillow hand the memory of large images back to the system at once, for processes that stay.

    In its usual smaller blocks it stays with the heap of each thread that decoded one.
    """
    Image.core.set_block_size(MAPPED_BLOCK)  # type: ignore[attr-defined]


def resize(rgb: RGB, size: tuple[int, int]) -> RGB:
    """Resize to (height, width) with an antialiased bilinear filter."""
    if rgb.shape[:2] == size:
        return rgb
    image = Image.fromarray(rgb)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, reducing_gap=3.0))


def small(rgb: RGB, side: int = SMALL_SIDE) -> RGB:
    """A picture whose longer side has so many pixels at most, for a page."""
    factor = min(1.0, side / max(rgb.shape[:2]))
    return resize(rgb, (max(1, round(rgb.shape[0] * factor)), max(1, round(rgb.shape[1] * factor))))


def resize_map(values: Float, size: tuple[int, int]) -> Float:
    """Resize a float map (H, W) to (height, width), bilinear, half-pixel centres."""
    if values.shape == size:
        return values
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def heat(values: Float, low: float, high: float) -> RGB:
    """Colour a map: `low` and below is near black, `high` and above pale yellow. Shape (H, W, 3)."""
    scaled = (values - low) / max(high - low, 1e-12)
    shades = (np.clip(np.nan_to_num(scaled), 0, 1) * 255).astype(np.uint8)
    return np.asarray(_PALETTE[shades])


def overlay(rgb: RGB, values: Float, low: float, high: float, threshold: float | None = None) -> RGB:
    """The photograph with its map glowing over it and, where the map passes `threshold`, a contour.

    `values` is resized to the photograph. Pixels near `low` stay as they are.
    """
    values = resize_map(values, rgb.shape[:2])
    strength = np.clip((values - low) / max(high - low, 1e-12), 0, 1)[..., None] * 0.6
    mixed = rgb * (1 - strength) + heat(values, low, high) * strength
    if threshold is not None:
        width = max(1, round(min(rgb.shape[:2]) / 250))
        mixed[outline(values > threshold, width)] = (255, 64, 96)
    return np.asarray(mixed, dtype=np.uint8)


def framed(rgb: RGB, boxes: Sequence[tuple[int, int, int, int]], matter: int | None = None) -> RGB:
    """A picture with numbered frames around boxes (left, top, width, height); but for the first `matter`, grey ones."""
    if not boxes:
        return rgb
    canvas = Image.fromarray(rgb)
    pen = ImageDraw.Draw(canvas)
    side = min(rgb.shape[:2])
    width, gap = max(1, round(side / 320)), max(2, round(side / 80))
    font = ImageFont.load_default(size=max(10, round(side / 24)))
    for number, (left, top, across, down) in enumerate(boxes, 1):
        corners = left - gap, top - gap, left + across - 1 + gap, top + down - 1 + gap
        colour = (255, 255, 255) if matter is None or number <= matter else (128, 128, 128)
        pen.rectangle(corners, outline=colour, width=width)
        x, y = max(0, corners[0]), max(0, corners[1])
        pen.text((x + 2 * width, y + width), str(number), colour, font, stroke_width=width, stroke_fill=0)
    return np.asarray(canvas)


def outline(region: npt.NDArray[np.bool_], width: int = 1) -> npt.NDArray[np.bool_]:
    """The rim, `width` pixels inside, of a region. A region that touches the border is closed there."""
    core = np.pad(region, 1)
    for _ in range(width):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    return region & ~core[1:-1, 1:-1]


def encode(rgb: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], format: str = "PNG", **options: Any) -> bytes:
    """Image bytes in a format that Pillow writes, of (H, W, 3) uint8, or of (H, W) in 8 or 16 bits."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=format, **options)
    return buffer.getvalue()


def data_uri(rgb: RGB) -> str:
    """A picture (H, W, 3) as a page holds it."""
    return "data:image/webp;base64," + base64.b64encode(encode(rgb, "WEBP", quality=82)).decode()


def from_data_uri(uri: str) -> RGB:
    """The picture (H, W, 3) that a page holds."""
    return read(base64.b64decode(uri.partition(",")[2]))


def write(path: str | os.PathLike[str], rgb: npt.NDArray[np.uint8], *, durable: bool = False) -> None:
    """Write an image in the format that its name says; an interrupted write leaves no file.

    One that cannot be made again is written so that it is `durable`.
    """
    path = Path(path)
    format = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    options = {"quality": 92} if format in ("JPEG", "WEBP") else {}
    with files.new_file(path, durable=durable) as temporary:
        temporary.write_bytes(encode(rgb, format, **options))


def write_picture(path: str | os.PathLike[str], rgb: npt.NDArray[np.uint8]) -> None:
    """Write a picture of what was found as PNG, marked so that nobody takes it for a photograph."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", MARK)
    with files.new_file(path, durable=False) as temporary:
        temporary.write_bytes(encode(rgb, "PNG", pnginfo=notes))


def is_marked(start: bytes) -> bool:
    """Whether a file that starts so, with `MARK_WITHIN` bytes, is a picture by `write_picture`."""
    return start.startswith(PNG_SIGNATURE) and MARK.encode() in start


def write_map(path: str | os.PathLike[str], values: Float) -> None:
    """Write a map (H, W) as a TIFF of 32-bit floats, not compressed; an interrupted write leaves no file."""
    with files.new_file(path, durable=False) as temporary:
        Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).save(temporary, format="TIFF")


def _known(source: Any, name: str) -> Source:
    """A source as it is, a tensor as an array, views of bytes as bytes. Anything else is `BadImage`."""
    if isinstance(source, str | os.PathLike | bytes | np.ndarray | Image.Image):
        return source
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "detach"):  # torch's, which is not imported for it
        array = np.asarray(source.detach().cpu().numpy())
        return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] in (1, 3, 4) else array
    kind = type(source).__name__
    raise BadImage(name, f"is a {kind}, not a path, encoded bytes, an array, a tensor or a PIL image", "unsupported")


def _open(source: Source, name: str, large: bool = False) -> Image.Image:
    """The image with its header read, of so many pixels at most as a `large` one, or another, may have."""
    limit = MAX_LARGE_PIXELS if large else MAX_PIXELS
    try:
        if isinstance(source, Image.Image):
            image: Image.Image = source.copy()
        else:
            if not isinstance(source, bytes):
                files.check_regular(source, MAX_FILE_BYTES)  # type: ignore[arg-type]
            file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
            with decoders.opening(limit):
                image = Image.open(file, formats=_decoders())
    except FileNotFoundError:
        raise BadImage(name, "does not exist (was it moved or deleted meanwhile?)") from None
    except PermissionError:
        raise BadImage(name, "cannot be read: check its permissions") from None
    except IsADirectoryError:
        raise BadImage(name, _about_folder(source)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, limit) from None
    except UnidentifiedImageError:
        empty = isinstance(source, bytes) and not source
        if isinstance(source, str | os.PathLike):
            empty = Path(source).stat().st_size == 0
        if empty:
            raise BadImage(name, "is empty (0 bytes)") from None
        raise BadImage(name, "is not an image, or in a format that is not supported", "unsupported") from None
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise BadImage(name, f"cannot be opened ({_reason(error)})") from None
    if image.width * image.height > limit:
        raise _too_large(name, limit)
    return image


def _about_folder(source: Source) -> str:
    try:
        os.listdir(source)  # type: ignore[arg-type]  # noqa: PTH208
    except OSError as error:
        return f"is a folder that cannot be opened ({error.strerror}): nothing in it was judged"
    return "is a folder, not an image"


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises, or libtiff prints of an image that it made up in part, says that it is damaged."""
    heard = decoders.heard()
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        reason = heard[0] if heard else _reason(error)
        raise BadImage(name, f"is damaged and cannot be decoded ({reason})") from None
    if heard:
        raise BadImage(name, f"is damaged and cannot be decoded whole ({heard[0]})")


def _reason(error: Exception) -> str:
    first = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0]
    return first if first and isinstance(error, OSError | ValueError | SyntaxError) else type(error).__name__


@cache
def _decoders() -> tuple[str, ...]:
    """The formats that are read. Pillow has others, of which some start programs."""
    Image.init()
    return tuple(format for format in _ENDINGS if format in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """How EXIF says that the image is turned, 1 to 8; 1, not at all, where it says nothing that can be understood."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # of whatever the bytes are
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _too_large(name: str, limit: int) -> BadImage:
    way_out = "cut it first" if limit > MAX_PIXELS else "scale or cut it first, or have it judged in tiles (`tile=320`)"
    return BadImage(name, f"has more than {limit / 1e6:.0f} megapixels: {way_out}", "too-large")


def _to_rgb(image: Image.Image, name: str, white: int, large: bool) -> RGB:
    if isinstance(image, ImageFile.ImageFile):
        if decoders.is_reduced(image):
            raise BadImage(name, "holds only a small copy of a raw photograph: convert it first", "unsupported")
        if decoders.has_pages(image):
            raise BadImage(name, "holds several pages or frames: save each as a file of its own", "unsupported")
        image.load()  # some formats turn the image themselves
        if (turn := _TURNS.get(_orientation(image))) is not None:
            image = image.transpose(turn)
    if min(image.size) < MIN_SIDE and not large:
        raise BadImage(name, f"is only {image.width}×{image.height} pixels; at least {MIN_SIDE}×{MIN_SIDE} are needed")
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_array(np.asarray(image), name, white, large)
    if image.width * image.height <= BAND:
        return _band_of(image)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        rgb[top : top + rows] = _band_of(image.crop((0, top, image.width, min(top + rows, image.height))))
    return rgb


def _band_of(image: Image.Image) -> RGB:
    if image.mode in ("P", "PA", "LA", "La"):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _from_array(array: npt.NDArray[Any], name: str, white: int, large: bool = False) -> RGB:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise BadImage(name, f"is an array of shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4)")
    limit = MAX_LARGE_PIXELS if large else MAX_PIXELS
    if min(array.shape[:2]) < (1 if large else MIN_SIDE):
        raise BadImage(
            name,
            f"is only {array.shape[1]}×{array.shape[0]} pixels; at least {MIN_SIDE}×{MIN_SIDE} are needed",
        )
    if array.shape[0] * array.shape[1] > limit:
        raise _too_large(name, limit)
    array = array[:, :, :3]
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise BadImage(name, "holds floats outside 0…1: scale them to that range first")
    elif array.dtype.kind in "ui" and array.dtype.itemsize > 1:
        if array.min() < 0 or array.max() > 65535:
            raise BadImage(name, "holds integers outside 0…65535, the range of 16-bit images")
        if white < WHITE and float((array > white).mean()) > TOO_BRIGHT:
            reason = (
                f"has values up to {array.max():,}, and the model learned from photographs of up to {white:,}: set "
            )
            raise BadImage(name, f"{reason}the camera to as many bits as before, or train again")
    elif array.dtype != np.uint8:
        raise BadImage(name, f"is an array of {array.dtype}; expected uint8, uint16 or float")
    if array.dtype == np.uint8 and array.shape[2] == 3:
        return array.copy()
    rgb = np.empty((*array.shape[:2], 3), np.uint8)
    rows = max(1, BAND // array.shape[1])
    for top in range(0, len(array), rows):
        rgb[top : top + rows] = _in_8_bits(array[top : top + rows], white)
    return rgb


def _in_8_bits(array: npt.NDArray[Any], white: int) -> npt.NDArray[np.uint8]:
    if array.dtype.kind == "f":
        array = np.rint(array * 255)
    elif array.dtype.itemsize > 1:
        array = np.minimum(array.astype(np.uint32), white) * 255 // white
    return array.astype(np.uint8)


def _palette() -> RGB:
    stops = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    colours = np.array(
        [(8, 6, 28), (66, 18, 104), (150, 36, 104), (222, 76, 54), (250, 158, 20), (252, 250, 180)],
        dtype=float,
    )
    ramp = np.linspace(0, 1, 256)
    return np.stack([np.interp(ramp, stops, colours[:, c]) for c in range(3)], axis=1).astype(np.uint8)


_PALETTE = _palette()
