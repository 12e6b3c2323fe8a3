"""Judging photographs from anywhere, without ground truth: rows, tables, overlays."""

import csv
import glob
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizu.data import files
from kizu.data import image as images
from kizu.errors import BadImage, DataError
from kizu.inference.evidence import Lookalike, side_by_side
from kizu.inference.inspector import Photo

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector
    from kizu.inference.regions import MarkedRegion

__all__ = ["Row", "judge", "listing", "profile", "write_csv"]


@dataclass(frozen=True)
class Row:
    """One photograph's verdict, or why there is none."""

    path: str
    score: float | None
    p_value: float | None  # how often a good part looks so unusual, at most
    verdict: str  # "stop", "pass" or "error"
    threshold: float
    seconds: float  # since the photograph before it, decoding included
    error: str = ""
    regions: Sequence["MarkedRegion"] = ()
    nearest: Sequence[Lookalike] = ()  # good patches, to the first regions or the highest place of the map
    parts: dict[str, Any] = field(default_factory=dict)  # what the score is made of, where the method says more

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def listing(arguments: Iterable[str]) -> list[Path]:
    """Files, the images below folders, and what globs match; each once, in order.

    Raises `DataError` for a folder without images or a glob without matches. A file that does not exist stays in the
    list: judging says what is wrong with it.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = list(images.scan(path))
            if not inside:
                raise DataError(f"{argument}: there are no images in this folder")
            found.update(dict.fromkeys(inside))
        elif not path.exists() and glob.has_magic(argument):
            matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
            if not matches:
                raise DataError(f"{argument}: no file has such a name")
            found.update(dict.fromkeys(match for match in matches if match.is_file()))
        else:
            found[path] = None
    return list(found)


def judge(
    detector: "Inspector",
    paths: Sequence[Path],
    overlays: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    why: Path | None = None,
) -> list[Row]:
    """A row for each path, in their order; overlays as PNG under their names where a folder is given.

    In the folder `why`, for each photograph that is stopped or marked, what is marked beside the nearest good patches.
    """
    photos = [Photo(path) for path in paths]
    targets = _overlay_names(paths, overlays) if overlays else {}
    beside = _overlay_names(paths, why) if why else {}
    rows: dict[Path, Row] = {}
    last = time.perf_counter()
    for photo, outcome in detector.judge(photos):
        path = Path(photo.name)
        nearest: list[Lookalike] = []
        if not isinstance(outcome, BadImage):
            try:
                if overlays:
                    images.write(targets[path], outcome.overlay())
                if why and (outcome.is_anomalous or outcome.regions) and (found := outcome.why()):
                    images.write(beside[path], side_by_side(found))
                    nearest = [one.nearest for one in found]
            except BadImage as error:
                outcome = error
        now = time.perf_counter()
        level = detector.threshold.value
        if isinstance(outcome, BadImage):
            rows[path] = Row(str(path), None, None, "error", level, now - last, outcome.reason)
        else:
            verdict = "stop" if outcome.is_anomalous else "pass"
            p, regions = outcome.p_value, outcome.regions
            seconds = now - last
            rows[path] = Row(str(path), outcome.score, p, verdict, level, seconds, "", regions, nearest, outcome.parts)
        last = now
        if progress:
            progress("", len(rows), len(paths))
    return [rows[path] for path in paths]


def profile(detector: "Inspector", paths: Sequence[Path], most: int = 20) -> dict[str, float]:
    """Milliseconds an image, one image at a time, of decoding, of each part of the graph, and of the rest."""
    graph: Any = getattr(detector, "graph", None)  # an exported model's has no parts that could be told apart
    spent: dict[str, float] = {"decode": 0.0}
    started: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, time.perf_counter())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: spent.__setitem__(name, spent.get(name, 0.0) + time.perf_counter() - started[name])

    hooks = []
    for name, part in graph.named_children() if graph else ():
        hooks += [part.register_forward_pre_hook(before(name)), part.register_forward_hook(after(name))]
    images_read = 0
    whole = 0.0
    for path in [paths[0], *paths[:most]]:  # the first one twice: it warms up
        start = time.perf_counter()
        rgb, _ = Photo(path).read(detector.preprocessing.enough)
        pixels = detector.preprocessing(rgb).transpose(2, 0, 1)[None]
        decoded = time.perf_counter()
        detector(pixels.copy())
        if images_read == 0:
            spent = {"decode": 0.0}
        else:
            spent["decode"] += decoded - start
            whole += time.perf_counter() - start
        images_read += 1
    for hook in hooks:
        hook.remove()
    spent["search and score" if graph else "graph"] = whole - sum(spent.values())
    return {name: 1000 * seconds / (images_read - 1) for name, seconds in spent.items()}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """image, score, p_value, verdict, threshold, seconds, error; written whole or not at all."""
    with files.new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "score", "p_value", "verdict", "threshold", "seconds", "error"])
        for row in rows:
            score = "" if row.score is None else f"{row.score:.9g}"
            p = "" if row.p_value is None else f"{row.p_value:.6g}"
            level, seconds = f"{row.threshold:.9g}", f"{row.seconds:.4f}"
            writer.writerow([row.path, score, p, row.verdict, level, seconds, row.error])


def _overlay_names(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """<folder>/<stem>.png, with as many parent folders in the name as it takes to tell the photographs apart."""
    for depth in range(1, 20):
        names = {path: "_".join([*path.parts[-depth:-1], path.name]).strip("/_") for path in paths}
        if len(set(names.values())) == len(names):
            break
    return {path: folder / (name.replace("/", "_") + ".png") for path, name in names.items()}
