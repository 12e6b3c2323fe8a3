"""Zones that a user names: from masks, files of annotations and corners; and a picture of where they are."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from kizu.config import Zone, build
from kizu.config.base import OtherConfig
from kizu.data import files, image
from kizu.data.geometry.zones import Ring, covered, drawn_in, is_file
from kizu.errors import DataError, OptionError

__all__ = ["read_zones", "zones_picture"]

MAX_BYTES = 20_000_000
MAX_NAME = 60
COLOURS = ((31, 119, 255), (255, 127, 14), (44, 180, 74), (227, 60, 200), (23, 190, 207), (188, 170, 34))
IGNORED = (235, 40, 60)

RGB = npt.NDArray[np.uint8]  # (H, W, 3)


def read_zones(
    inspect: Sequence[str] = (),
    ignore: Sequence[str] = (),
    *,
    file: str = "",
    false_alarms: Mapping[str, float] | None = None,
    min_area: Mapping[str, float] | None = None,
    min_length: Mapping[str, float] | None = None,
    max_count: Mapping[str, int] | None = None,
    photograph: Callable[[], tuple[int, int]] | tuple[int, int] | None = None,
) -> tuple[Zone, ...]:
    """Zones for the setting `zones`, from what outlines them.

    Each of `inspect` and `ignore` is "NAME=WHAT" or "WHAT", which is a mask (an image, not zero inside), a file of
    annotations drawn on one photograph (COCO, Label Studio, VIA, CVAT), corners in pixels ("40,40 200,40 200,120") or
    in percent ("10%,10% 50%,10% 50%,90%"), or "all". Without a name, annotations have their labels. `file` holds zones
    as kizu writes them. `false_alarms` gives zones, by name, a promise of their own, and `min_area`, `min_length` and
    `max_count` say what is too small to matter in them. `photograph` is the width and height that corners in pixels are
    of, where the file does not say it. Raises `OptionError` and `DataError` for what cannot be understood.
    """
    outlined: dict[tuple[str, bool], list[Ring]] = {}
    size = photograph if callable(photograph) else lambda: _known(photograph)
    for ignored, sources in ((False, inspect), (True, ignore)):
        for number, source in enumerate([sources] if isinstance(sources, str) else sources, 1):
            name, what = _split(source)
            for label, rings in drawn_in(what, size):
                usual = _plain(label) or _usual_name(what, number, ignored=ignored)
                while not (name or label) and (usual, ignored) in outlined:
                    usual += "'"
                outlined.setdefault((name or usual, ignored), []).extend(rings)
    zones = [{"name": name, "rings": rings, "ignored": ignored} for (name, ignored), rings in outlined.items()]
    found = build(OtherConfig, {"zones": [*(_saved(file) if file else []), *zones]}).zones
    given = {"false_alarms": false_alarms, "min_area": min_area, "min_length": min_length, "max_count": max_count}
    named: dict[str, dict[str, float]] = {zone.name: {} for zone in found}
    for setting, values in given.items():
        for name, value in (values or {}).items():
            if name not in named:
                raise OptionError(f"no zone is called {name}: there are {', '.join(named) or 'none'}")
            named[name][setting] = value
    return build(OtherConfig, {"zones": [zone.model_dump() | named[zone.name] for zone in found]}).zones


def _split(source: str) -> tuple[str, str]:
    name, equals, what = source.partition("=")
    return (name.strip(), what.strip()) if equals and not is_file(source) else ("", source.strip())


def _plain(label: str) -> str:
    """A label as a zone's name can be."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())[:MAX_NAME].strip()


def _usual_name(what: str, number: int, *, ignored: bool) -> str:
    """Of a zone to which nobody gave a name."""
    if what == "all":
        return "elsewhere"
    if is_file(what):
        return _plain(Path(what).stem)
    return f"ignored {number}" if ignored else f"zone {number}"


def _known(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise OptionError(
            "corners in pixels are of a photograph: say how wide and high it is, or write them in percent"
        )
    return size


def _saved(file: str) -> list[object]:
    """The zones in a file that kizu wrote, a list or a run.json, or in the text of such a list."""
    text = file
    try:
        if not file.lstrip().startswith("["):
            files.check_regular(Path(file), MAX_BYTES)
            text = Path(file).read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file[:60]} is not JSON ({error})") from None
    if isinstance(value, dict):
        config = value.get("config", value)
        value = config.get("zones") if isinstance(config, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{file} holds no zones: it is a list of objects with name, rings and ignored")
    return value


def zones_picture(photo: RGB, zones: Sequence[Zone]) -> RGB:
    """A photograph (H, W, 3) with each zone outlined and named, and what is ignored in red."""
    height, width = photo.shape[:2]
    picture = photo.copy()
    colours = iter(COLOURS * len(zones))
    labels = []
    for zone in zones:
        colour = IGNORED if zone.ignored else next(colours)
        inside = covered(zone.rings, (height, width))
        if zone.ignored:
            picture[inside] = 0.7 * picture[inside] + 0.3 * np.array(colour)
        picture[image.outline(inside, max(2, min(height, width) // 160))] = colour
        labels.append((f"{zone.name} (ignored)" if zone.ignored else zone.name, colour, np.argwhere(inside)))
    drawn = Image.fromarray(picture)
    font = ImageFont.load_default(max(12, min(height, width) / 24))
    for text, colour, places in labels:
        y, x = places.min(0) + min(height, width) // 60 if len(places) else (0, 0)
        ImageDraw.Draw(drawn).text((float(x), float(y)), text, colour, font, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(drawn)
