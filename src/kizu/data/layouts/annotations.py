"""What people drew in a labelling tool, from the file that it exports.

COCO               an object with images, annotations and categories; of many tools
Label Studio       a list of tasks
VIA                an object of images with regions (VGG Image Annotator), alone or in a project
CVAT               XML of images with shapes and tags
Lookout for Vision a manifest: a line of JSON for each image
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree as Xml

from kizu.data import files
from kizu.data.image import MAX_PIXELS
from kizu.data.masks import Polygon, Runs, Shape
from kizu.errors import DataError

__all__ = ["SUFFIXES", "UNNAMED", "Annotated", "Annotations", "plain_name", "read_annotations"]

SUFFIXES = {".json", ".xml", ".manifest", ".jsonl"}
MAX_BYTES = 300_000_000
CORNERS = 72  # of a polygon that stands for an ellipse
UNNAMED = "defect"

Entry = Any  # what JSON holds


@dataclass(frozen=True)
class Mark:
    """One thing that was said of an image: a label, and the region that it is about, if any."""

    label: str
    shape: Shape | None = None


@dataclass
class Annotated:
    """An image by the name that the file gives it, and all that was said of it."""

    name: str
    marks: list[Mark] = field(default_factory=list)
    mask: str = ""  # the name of a file with the regions


@dataclass(frozen=True)
class Annotations:
    path: Path
    tool: str
    images: list[Annotated]


def read_annotations(path: Path) -> Annotations | None:
    """The annotations in a file; None for a file of something else.

    Raises `DataError` for one that looks like annotations and cannot be read as such.
    """
    if path.suffix.lower() not in SUFFIXES:
        return None
    try:
        files.check_regular(path, MAX_BYTES)
        content = path.read_bytes()
    except OSError:
        return None
    tool, found = _by_tool(content, path.suffix.lower())
    if found is None:
        return None
    try:
        return Annotations(path, tool, list(found()))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} looks like annotations of {tool}, but cannot be read ({type(error).__name__}: {error}): export "
            "it again, or take it out of the folder"
        ) from None


def _by_tool(content: bytes, suffix: str) -> tuple[str, Callable[[], Iterator[Annotated]] | None]:
    """Whose export this is, and how to read it."""
    if suffix == ".xml":
        try:
            root = Xml.fromstring(content)
        except (Xml.ParseError, ValueError):
            return "", None
        return (
            ("CVAT", lambda: _cvat(root))
            if root.tag == "annotations" and root.find("image") is not None
            else ("", None)
        )
    if suffix in (".manifest", ".jsonl"):
        return ("Lookout for Vision", lambda: _manifest(content)) if b'"source-ref"' in content[:4096] else ("", None)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return "", None
    if isinstance(value, list) and value and all(isinstance(task, dict) and "data" in task for task in value):
        return "Label Studio", lambda: _label_studio(value)
    if not isinstance(value, dict):
        return "", None
    if all(isinstance(value.get(key), list) for key in ("images", "annotations", "categories")):
        return "COCO", lambda: _coco(value)
    regions = value.get("_via_img_metadata", value)
    if (
        isinstance(regions, dict)
        and regions
        and all(isinstance(entry, dict) and {"filename", "regions"} <= entry.keys() for entry in regions.values())
    ):
        return "VIA", lambda: _via(regions)
    return "", None


def _coco(value: Entry) -> Iterator[Annotated]:
    names = {category["id"]: str(category["name"]) for category in value["categories"]}
    marks: dict[Any, list[Mark]] = {}
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in value["images"]}
    for entry in value["annotations"]:
        label, size = names.get(entry.get("category_id"), UNNAMED), sizes.get(entry["image_id"], (None, None))
        shapes = list(_coco_shapes(entry, (size[0], size[1]) if size[0] and size[1] else None))
        said = [Mark(label, shape) for shape in shapes] or [Mark(label)]
        marks.setdefault(entry["image_id"], []).extend(said)
    for image in value["images"]:
        yield Annotated(str(image["file_name"]), marks.get(image["id"], []))


def _coco_shapes(entry: Entry, size: tuple[float, float] | None) -> Iterator[Shape]:
    drawn = entry.get("segmentation")
    if isinstance(drawn, list) and drawn:
        for numbers in drawn:
            yield Polygon(tuple(zip(map(float, numbers[::2]), map(float, numbers[1::2]), strict=True)), size)
    elif isinstance(drawn, dict):
        rows, columns = map(int, drawn["size"])
        lengths = drawn["counts"] if isinstance(drawn["counts"], list) else _coco_lengths(drawn["counts"])
        yield _runs(lengths, (0, 0, columns, rows), (columns, rows), by_columns=True)
    elif entry.get("bbox"):
        left, top, width, height = map(float, entry["bbox"])
        yield _box(left, top, width, height, size)


def _coco_lengths(text: str) -> list[int]:
    """Runs from COCO's text: five bits a character, the lowest first; from the third on differences to two before."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def _label_studio(tasks: Entry) -> Iterator[Annotated]:
    for task in tasks:
        finished = [answer for answer in task.get("annotations") or [] if not answer.get("was_cancelled")]
        address = next((text for text in task["data"].values() if isinstance(text, str)), "")
        if finished:
            marks = [mark for answer in finished for entry in answer["result"] for mark in _label_studio_marks(entry)]
            yield Annotated(_name_in(address), marks)


def _label_studio_marks(entry: Entry) -> Iterator[Mark]:
    """Numbers are percent of the sides."""
    value, kind = entry["value"], entry["type"]
    labels = [str(label) for label in value.get(kind) or value.get("labels") or [UNNAMED]]
    across, down = float(entry.get("original_width") or 100), float(entry.get("original_height") or 100)
    x, y = across / 100, down / 100
    shape: Shape | None = None
    if kind.startswith("rectangle"):
        left, top = value["x"] * x, value["y"] * y
        turned = math.radians(value.get("rotation") or 0)
        shape = _box(left, top, value["width"] * x, value["height"] * y, (across, down), turned, (left, top))
    elif kind.startswith("polygon"):
        shape = Polygon(tuple((float(a) * x, float(b) * y) for a, b in value["points"]), (across, down))
    elif kind.startswith("ellipse"):
        turned = math.radians(value.get("rotation") or 0)
        radii = value["radiusX"] * x, value["radiusY"] * y
        shape = _ellipse(value["x"] * x, value["y"] * y, *radii, (across, down), turned)
    elif kind not in ("choices", "labels") and not kind.startswith(("brush", "keypoint")):
        return  # a relation, a rating, a text
    for label in labels:
        yield Mark(label, shape)


def _via(images: Entry) -> Iterator[Annotated]:
    for image in images.values():
        regions = image["regions"]
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        marks = [Mark(_said(entry.get("region_attributes")) or UNNAMED, _via_shape(entry)) for entry in regions]
        if tag := _said(image.get("file_attributes")):
            marks.append(Mark(tag))
        yield Annotated(str(image["filename"]), marks)


def _via_shape(entry: Entry) -> Shape | None:
    shape = entry["shape_attributes"]
    kind = shape.get("name")
    if kind == "rect":
        left, top, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return _box(left, top, width, height, None)
    if kind == "circle":
        return _ellipse(float(shape["cx"]), float(shape["cy"]), float(shape["r"]), float(shape["r"]), None)
    if kind == "ellipse":
        x, y, rx, ry = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        return _ellipse(x, y, rx, ry, None, float(shape.get("theta") or 0))
    if kind in ("polygon", "polyline"):
        points = zip(map(float, shape["all_points_x"]), map(float, shape["all_points_y"]), strict=True)
        return Polygon(tuple(points))
    return None


def _said(attributes: Entry) -> str:
    """The first answer among an image's or a region's attributes."""
    for value in (attributes or {}).values() if isinstance(attributes, dict) else ():
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, dict) and any(value.values()):
            return str(next(key for key, chosen in value.items() if chosen))
    return ""


def _cvat(root: Xml.Element) -> Iterator[Annotated]:
    for image in root.iter("image"):
        size = float(image.attrib["width"]), float(image.attrib["height"])
        marks = [Mark(entry.attrib.get("label", UNNAMED), _cvat_shape(entry, size)) for entry in image]
        yield Annotated(image.attrib["name"], marks)


def _cvat_shape(entry: Xml.Element, size: tuple[float, float]) -> Shape | None:
    def numbers(*names: str) -> list[float]:
        return [float(entry.attrib[name]) for name in names]

    turned = math.radians(float(entry.attrib.get("rotation", 0)))
    if entry.tag == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        middle = (left + right) / 2, (top + bottom) / 2
        return _box(left, top, right - left, bottom - top, size, turned, middle)
    if entry.tag in ("polygon", "polyline"):
        points = [point.split(",") for point in entry.attrib["points"].split(";")]
        return Polygon(tuple((float(x), float(y)) for x, y in points), size)
    if entry.tag == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        return _ellipse(x, y, rx, ry, size, turned)
    if entry.tag == "mask":
        left, top, width, height = map(int, numbers("left", "top", "width", "height"))
        lengths = [int(text) for text in entry.attrib["rle"].split(",")]
        return _runs(lengths, (left, top, width, height), (int(size[0]), int(size[1])))
    return None


def _manifest(content: bytes) -> Iterator[Annotated]:
    for line in content.splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        metadata = [value for key, value in row.items() if key.endswith("-metadata") and isinstance(value, dict)]
        said = next((str(value["class-name"]) for value in metadata if "class-name" in value), "")
        if not said:
            continue  # nobody has labelled it yet
        mask = next((str(value) for key, value in row.items() if key.endswith("mask-ref")), "")
        kinds = {
            str(colour["class-name"])
            for value in metadata
            for colour in (value.get("internal-color-map") or {}).values()
            if str(colour["class-name"]).casefold() != "background"
        }
        labels = ["good"] if said.casefold() == "normal" else sorted(kinds) or [said]
        yield Annotated(_name_in(row["source-ref"]), [Mark(label) for label in labels], _name_in(mask))


def _name_in(address: str) -> str:
    """The path in an address: s3://bucket/a/b.png, /data/local-files/?d=a/b.png, C:\\a\\b.png."""
    address = address.replace("\\", "/")
    parts = urlsplit(address) if "://" in address or "?" in address else None
    if parts is None:
        return address
    inner = parse_qs(parts.query).get("d")
    return inner[0] if inner else unquote(parts.path)


def plain_name(name: str) -> str:
    """A file's name without what Label Studio puts before it when it is uploaded."""
    return re.sub(r"^[0-9a-f]{8}-", "", PurePosixPath(name).name)


def _runs(
    lengths: list[int], box: tuple[int, int, int, int], size: tuple[int, int], *, by_columns: bool = False
) -> Runs:
    left, top, width, height = box
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"an image of {size[0]} × {size[1]} pixels")
    fits = left >= 0 and top >= 0 and left + width <= size[0] and top + height <= size[1]
    if min(lengths, default=0) < 0 or sum(lengths) != width * height or not fits:
        raise ValueError(f"{sum(lengths)} pixels in runs for a box of {width} × {height}")
    return Runs(tuple(lengths), box, size, by_columns)


def _box(
    left: float,
    top: float,
    width: float,
    height: float,
    size: tuple[float, float] | None,
    turned: float = 0.0,
    about: tuple[float, float] = (0.0, 0.0),
) -> Polygon:
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    return Polygon(tuple(_rotated(x, y, turned, about) for x, y in corners), size)


def _ellipse(
    x: float, y: float, rx: float, ry: float, size: tuple[float, float] | None, turned: float = 0.0
) -> Polygon:
    angles = (2 * math.pi * corner / CORNERS for corner in range(CORNERS))
    points = ((x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles)
    return Polygon(tuple(_rotated(a, b, turned, (x, y)) for a, b in points), size)


def _rotated(x: float, y: float, turned: float, about: tuple[float, float]) -> tuple[float, float]:
    across, down = x - about[0], y - about[1]
    cosine, sine = math.cos(turned), math.sin(turned)
    return about[0] + across * cosine - down * sine, about[1] + across * sine + down * cosine
