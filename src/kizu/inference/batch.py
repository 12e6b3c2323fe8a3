"""Verdicts on many files at once, without ground truth: a list, a table, overlays, and where the time goes."""

import glob
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kizu.calibration.threshold import from_finite
from kizu.data import files, image
from kizu.data.photographs import scan
from kizu.data.progress import Progress, silent
from kizu.errors import BadImage, DataError
from kizu.inference.evidence import side_by_side
from kizu.inference.prediction import NearestPatch, Photo, Prediction
from kizu.inference.verdict import Verdict

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["FileVerdict", "image_paths", "predict_files", "profile", "write_csv"]

IN_JSON = (
    *("score", "p_value", "verdict", "threshold", "zone", "seconds", "cannot_judge", "error"),
    *("regions", "nearest", "parts"),
)
MEASURES = ("area", "length", "width", "direction", "unit")
MAX_DEPTH = 20  # folders in the name of an overlay


class FileVerdict(Verdict):
    """The verdict on a file; `image` is its path."""

    seconds: float = Field(description="since the photograph before it, decoding included")
    nearest: list[NearestPatch] = Field([], description="good patches, to the first regions or the map's highest place")

    def to_json(self) -> dict[str, Any]:
        """The row that the command `predict` prints as JSON."""
        values = self.model_dump() | {"threshold": from_finite(self.threshold)}
        return {"path": self.image, **{name: values[name] for name in IN_JSON}}


def image_paths(arguments: Iterable[str]) -> list[Path]:
    """Files, the images below folders, and what globs match; each once, in order.

    Raises `DataError` for a folder without images or a glob without matches. A file that does not exist stays in the
    list: its verdict says what is wrong with it.
    """
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = list(scan(path))
            if not inside:
                raise DataError(f"{argument}: there are no images in this folder")
            paths.update(dict.fromkeys(inside))
        elif not path.exists() and glob.has_magic(argument):
            matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
            if not matches:
                raise DataError(f"{argument}: no file has such a name")
            paths.update(dict.fromkeys(match for match in matches if match.is_file()))
        else:
            paths[path] = None
    return list(paths)


def predict_files(
    model: "Inspector",
    paths: Sequence[Path],
    *,
    overlays: Path | None = None,
    why: Path | None = None,
    progress: Progress = silent,
) -> list[FileVerdict]:
    """A verdict for each path, in their order.

    `overlays` and `why` are folders for PNG files named after the photographs: each photograph with its heat map, and,
    for each that is stopped or marked, the marked places beside the nearest good patches.
    """
    overlay_files = _output_names(paths, overlays, "-overlay.png") if overlays else {}
    why_files = _output_names(paths, why, "-why.png") if why else {}
    verdicts: dict[Path, FileVerdict] = {}
    last = time.perf_counter()
    for photo, outcome in model.judge([Photo(path) for path in paths], progress=progress):
        path = Path(photo.name)
        nearest: list[NearestPatch] = []
        if isinstance(outcome, Prediction):
            try:
                if overlays:
                    image.write_picture(overlay_files[path], outcome.overlay())
                if why and (outcome.is_anomalous or outcome.regions) and (evidence := outcome.why()):
                    image.write_picture(why_files[path], side_by_side(evidence))
                    nearest = [item.nearest for item in evidence]
            except BadImage as error:
                outcome = error
        now = time.perf_counter()
        verdicts[path] = FileVerdict.of(str(path), outcome, model, seconds=now - last, nearest=nearest)
        last = now
        progress("", len(verdicts), len(paths))
    return [verdicts[path] for path in paths]


def profile(model: "Inspector", paths: Sequence[Path], max_images: int = 20) -> dict[str, float]:
    """Milliseconds an image, one image at a time: decoding, each part of a trained model's graph, and the rest.

    Of an image that is judged in tiles it is all of them.
    """
    graph = model.graph
    spent: dict[str, float] = {}
    total = 0.0
    with _timed_parts(graph, spent):
        for number, path in enumerate([paths[0], *paths[:max_images]]):
            start = time.perf_counter()
            rgb, _ = model.preprocessing.read(Photo(path), model.preprocessing.enough)
            pixels = list(model.preprocessing.inputs(rgb))
            decoded = time.perf_counter()
            for batch in pixels:
                model(batch)
            if number == 0:  # the first image comes twice, because it warms up
                spent.clear()
                spent["decode"] = 0.0
            else:
                spent["decode"] += decoded - start
                total += time.perf_counter() - start
    spent["search and score" if graph else "graph"] = total - sum(spent.values())
    return {name: 1000 * seconds / number for name, seconds in spent.items()}


def write_csv(path: Path, verdicts: Sequence[FileVerdict], model: "Inspector | None" = None) -> None:
    """image, score, p_value, verdict, threshold, seconds, error, and zone if there are any; whole or not at all.

    With a model that refuses photographs, also why it does; with one that measures, how many regions matter, and the
    largest one's area, length, width and direction.
    """
    measured = model is not None and model.measured_on is not None
    refusing = model is not None and model.captures is not None
    zoned = any(verdict.zone for verdict in verdicts)
    rows = [
        [
            verdict.image,
            None if verdict.score is None else f"{verdict.score:.9g}",
            None if verdict.p_value is None else f"{verdict.p_value:.6g}",
            verdict.verdict,
            f"{from_finite(verdict.threshold):.9g}",
            f"{verdict.seconds:.4f}",
            verdict.error,
            *([verdict.zone] if zoned else []),
            *([verdict.cannot_judge] if refusing else []),
            *(_measures(verdict) if measured else []),
        ]
        for verdict in verdicts
    ]
    names = ["image", "score", "p_value", "verdict", "threshold", "seconds", "error", *(["zone"] if zoned else [])]
    further = [*(["cannot_judge"] if refusing else []), *(["regions", *MEASURES] if measured else [])]
    files.write_csv(path, [*names, *further], rows)


def _measures(verdict: FileVerdict) -> list[Any]:
    """How many regions matter, and how large the largest of these, or else of all, is."""
    large = [region for region in verdict.regions if region.matters]
    sizes = [region.size for region in large or verdict.regions if region.size is not None]
    largest = max(sizes, key=lambda size: size.area, default=None)
    return [len(large), *(None if largest is None else getattr(largest, name) for name in MEASURES)]


@contextmanager
def _timed_parts(graph: Any, spent: dict[str, float]) -> Iterator[None]:
    """While it is open, add the seconds that each child of a torch module takes to `spent`.

    This room imports no torch: the module and its hooks are used by the names of their methods alone.
    """
    started: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, time.perf_counter())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: spent.__setitem__(name, spent.get(name, 0.0) + time.perf_counter() - started[name])

    hooks = []
    for name, part in graph.named_children() if graph else ():
        hooks += [part.register_forward_pre_hook(before(name)), part.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output_names(paths: Sequence[Path], folder: Path, ending: str) -> dict[Path, Path]:
    """<folder>/<name><ending>, with as much of the path in the name as it takes to tell the photographs apart."""
    names = {path: path.stem for path in paths}
    for depth in range(1, MAX_DEPTH):
        if len(set(names.values())) == len(names):
            break
        names = {path: "_".join([*path.parts[-depth:-1], path.name]).strip("/_") for path in paths}
    return {path: folder / files.short_name(name.replace("/", "_"), ending) for path, name in names.items()}
