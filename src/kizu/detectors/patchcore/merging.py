"""Of several models that are merged, the scores that count: one of each part that was photographed."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kizu.calibration.copies import first_of_each_part
from kizu.detectors.base import Detector

__all__ = ["each_photograph_once"]

UNSEEN = (
    "Whether the models learned from nearly the same photographs cannot be seen: such copies would count more than "
    "once in what is promised. Models that were trained with `thumbnails=True` show it."
)


def each_photograph_once(parts: Sequence[Detector]) -> tuple[list[float], list[float], list[str]]:
    """The scores and map peaks of all parts, without those of photographs that an earlier part has; and remarks.

    The same file is known by its hash, one saved again or taken in the same moment by its picture. Where a part has a
    score for something else than each photograph, all its scores are taken.
    """
    scores, peaks, known = list[float](), list[float](), set[str]()
    pictured = all(map(_scored_each, parts))
    copies = _copies(parts) if pictured else None
    repeated = nearly = 0
    for place, part in enumerate(parts):
        digests = part.training["digests"]
        for number, score in enumerate(part.calibration_scores):
            if _scored_each(part) and digests[number] in known:
                repeated += 1
            elif copies is not None and (place, number) in copies:
                nearly += 1
            else:
                scores.append(score)
                peaks += part.map_peaks[number : number + 1]
        known |= {*digests, *part.training.get("copies", [])}
    remarks = [
        *([f"{repeated} photographs were learned from by several of the models: each counts once."] * bool(repeated)),
        *([f"{nearly} photographs show the same part as one of another model: each part counts once."] * bool(nearly)),
        *([UNSEEN] * (pictured and copies is None)),
    ]
    return scores, peaks, remarks


def _scored_each(part: Detector) -> bool:
    return len(part.training["digests"]) == len(part.calibration_scores) == len(part.map_peaks)


def _copies(parts: Sequence[Detector]) -> set[tuple[int, int]] | None:
    """Which photographs, by part and number, show the same as one of an earlier part; None if they are not at hand."""
    places = [(part, number) for part in range(len(parts)) for number in range(len(parts[part].calibration_scores))]

    def pictures() -> Iterator[npt.NDArray[np.uint8]]:
        for part, number in places:
            picture = parts[part].picture(number)
            if picture is None:
                raise FileNotFoundError
            yield picture.transpose(2, 0, 1)

    try:
        first = first_of_each_part(pictures())
    except FileNotFoundError:
        return None
    return {place for place, original in zip(places, first, strict=True) if places[original][0] != place[0]}
