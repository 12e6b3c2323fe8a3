"""A detector over a test split: per-image rows, per-category results."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kizu.calibration.captures import kind_of
from kizu.calibration.threshold import one_in, percent
from kizu.data import files, image
from kizu.data.dataset import Sample
from kizu.data.geometry.alignment import turned
from kizu.data.inspection import about_doubts
from kizu.data.masks import Region, Saturations, read_doubted, read_regions
from kizu.data.progress import Progress, silent
from kizu.errors import BadImage, DataError
from kizu.evaluation import loco_metrics, metrics
from kizu.inference.zones import zones_picture

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector
    from kizu.inference.prediction import Prediction

__all__ = ["CategoryResult", "ImageScore", "Outlier", "PatchPair", "Picture", "evaluate", "measure"]

PICTURES = {"miss": 6, "false alarm": 6, "sample": 9}
PICTURE_SIDE = 280
MAX_PAIRS = 2  # a picture
MAX_OUTLIERS = 12  # training images that are shown
MAX_NOTES = 5  # on masks that do not fit
MAX_DEPTH = 20  # folders in the name of a map
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageScore:
    """One test image and what the detector said of it."""

    image: str  # path relative to the data set, with forward slashes
    defect: str  # "good" or the type of defect
    score: float | None  # None when the file could not be read
    error: str = ""  # why not
    cannot_judge: str = ""  # why no promise covers the photograph,
    answer: str = ""  # and what the verdict is then


@dataclass(frozen=True)
class PatchPair:
    """A marked patch and the most similar patch in any good training image; pictures are data URIs."""

    region: int  # number of the marked region; 0: the highest place of the map
    query: str
    match: str  # empty where no picture of the training image is at hand
    image: str  # name of the training image
    distance: float  # in units of what is usual there


@dataclass(frozen=True)
class Outlier:
    """A training image that looks unlike the others."""

    image: str
    score: float
    photo: str  # data URI, or empty


@dataclass(frozen=True)
class Picture:
    """One test image for the eye, each part a data URI. The colour scale is the category's."""

    image: str  # as in ImageScore
    why: str  # "miss", "false alarm" or "sample"
    photo: str
    heat: str
    overlay: str
    pairs: list[PatchPair] = field(default_factory=list)


@dataclass
class CategoryResult:
    """Everything that results.csv, predictions.csv and the report say of one category."""

    category: str
    train_images: int
    scores: list[ImageScore]
    metrics: dict[str, float | None]  # image_auroc, image_ap, … None: not available
    reasons: dict[str, str]  # why a metric is None
    threshold: float  # a part is stopped when its score is greater
    statement: str  # the threshold's promise in one sentence
    calibration_scores: list[float]  # scores of held-out good images
    heat_map_range: tuple[float, float]  # map values at the ends of the colour scale
    pixel_threshold: float  # map value at which contours are drawn
    pictures: list[Picture] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # stage → seconds; "per image" in seconds
    notes: list[str] = field(default_factory=list)  # what a reader must know, e.g. masks that do not fit
    curves: dict[str, list[float]] = field(default_factory=dict)  # of training, a value a round
    oracle: dict[str, float | None] = field(default_factory=dict)  # metrics of the round best on the test images
    outliers: list[Outlier] = field(default_factory=list)  # training images for a second look
    choice: dict[str, Any] = field(default_factory=dict)  # how the settings were chosen, `Choice.to_json`
    zones: dict[str, str] = field(default_factory=dict)  # where they are: a picture, and what holds in them

    def count(self, defective: bool, stopped: bool | None = None) -> int:
        """Test images of a kind that could be read, all or those (not) stopped."""
        verdicts = {None: ("stop", "pass", "ask"), True: ("stop",), False: ("pass",)}[stopped]
        return sum((row.defect != "good") == defective and self.verdict(row) in verdicts for row in self.scores)

    def verdict(self, row: ImageScore) -> str:
        """What the threshold says of a test image; or what becomes of one that cannot be judged, or read."""
        if row.score is None:
            return "error"
        if row.cannot_judge:
            return row.answer
        return "stop" if row.score > self.threshold else "pass"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CategoryResult":
        values = dict(values)
        values["scores"] = [ImageScore(**row) for row in values["scores"]]
        values["pictures"] = [
            Picture(**{**row, "pairs": [PatchPair(**pair) for pair in row["pairs"]]}) for row in values["pictures"]
        ]
        values["outliers"] = [Outlier(**row) for row in values["outliers"]]
        values["heat_map_range"] = tuple(values["heat_map_range"])
        return cls(**values)


def evaluate(
    detector: "Inspector",
    samples: Sequence[Sample],
    *,
    category: str,
    root: Path,
    saturations: Saturations | None = None,
    maps: Path | None = None,
    overlays: Path | None = None,
    progress: Progress = silent,
) -> CategoryResult:
    """Score the test images and compare with what is known of them. Nothing of it flows back into the detector.

    Masks are used at the photographs' own resolution. Metrics that cannot be computed are None, with the reason. For
    MVTec LOCO's types of defect its own metrics are added, by `saturations`. With `maps`, each image's anomaly map is
    written as <maps>/<category>/test/<defect>/<stem>.tiff, of floats, at the photograph's size. With a folder for
    `overlays`, each photograph is written there with its map over it.
    """
    scores: list[ImageScore] = []
    predictions: list[tuple[Sample, Prediction]] = []
    targets = _map_names(samples, maps / category / "test", root) if maps else {}
    start = time.perf_counter()
    for sample, outcome in detector.judge(samples, progress=progress):
        name = sample.name(root)
        if isinstance(outcome, BadImage):
            scores.append(ImageScore(name, sample.defect, None, outcome.reason))
        else:
            why, answer = outcome.cannot_judge, outcome.verdict if outcome.cannot_judge else ""
            scores.append(ImageScore(name, sample.defect, outcome.score, cannot_judge=why, answer=answer))
            predictions.append((sample, outcome))
            if maps:
                image.write_map(targets[sample], _restored(outcome))
            if overlays is not None:
                image.write_picture(overlays / files.short_name(name.replace("/", "_"), ".png"), outcome.overlay())
        progress("Evaluating", len(scores), len(samples))
    elapsed = time.perf_counter() - start
    order = {sample.name(root): index for index, sample in enumerate(samples)}
    scores.sort(key=lambda row: order[row.image])
    progress("Measuring", 0, 1)
    values, reasons, notes = measure(predictions, saturations)
    progress("Measuring", 1, 1)
    return CategoryResult(
        category=category,
        train_images=detector.training.get("images", 0),
        scores=scores,
        metrics=values,
        reasons=reasons,
        threshold=detector.threshold.value,
        statement=detector.threshold.statement,
        calibration_scores=detector.calibration_scores,
        heat_map_range=detector.heat_map_range,
        pixel_threshold=detector.pixel_threshold,
        zones=_zones(detector, samples),
        pictures=_pictures(predictions, root, seed=detector.config.seed),
        seconds={**detector.seconds, "evaluation": elapsed, "per image": elapsed / max(1, len(scores))},
        notes=[*detector.remarks, *_refused(scores), *notes],
        curves=detector.curves,
        outliers=_outliers(detector),
    )


def _refused(scores: Sequence[ImageScore]) -> list[str]:
    """A note on the test images that cannot be judged, by reason."""
    reasons = Counter(kind_of(row.cannot_judge) for row in scores if row.cannot_judge)
    if not reasons:
        return []
    good = sum(bool(row.cannot_judge) for row in scores if row.defect == "good")
    each = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
    return [f"{reasons.total()} test images cannot be judged, {good} of them good ones: {each}."]


def measure(
    predictions: "Sequence[tuple[Sample, Prediction]]", saturations: Saturations | None = None
) -> tuple[dict[str, float | None], dict[str, str], list[str]]:
    """Metrics, reasons for missing ones, notes. Maps and masks are made anew whenever needed, one at a time."""
    scores = [prediction.score for _, prediction in predictions]
    labels = [sample.is_anomalous for sample, _ in predictions]
    values, reasons = metrics.image_metrics(scores, labels)
    usable, notes = _usable(predictions, saturations)
    measured = [
        metrics.pixel_metrics(
            _Repeatable(lambda: (_restored(prediction) for _, prediction in usable)),
            _Repeatable(lambda: (_mask(sample, prediction) for sample, prediction in usable)),
        )
    ]
    defects = [sample.defect for sample, _ in predictions]
    if loco_metrics.applies(defects):

        def map_and_regions(index: int) -> tuple[npt.NDArray[np.float32], list[Region]]:
            sample, prediction = usable[index]
            return _restored(prediction), _regions(sample, prediction, saturations)

        peaks = [float(_restored(prediction).max()) for _, prediction in predictions]
        measured.append(loco_metrics.detection(defects, scores, peaks))
        measured.append(loco_metrics.localisation([sample.defect for sample, _ in usable], map_and_regions))
        if saturations is None:
            notes.append(loco_metrics.NO_CONFIG)
    measured.append(metrics.plugin_metrics(scores, labels))
    for further_values, further_reasons in measured:
        values, reasons = values | further_values, reasons | further_reasons
    return values, reasons, notes


def _usable(
    predictions: "Sequence[tuple[Sample, Prediction]]", saturations: Saturations | None
) -> "tuple[list[tuple[Sample, Prediction]], list[str]]":
    """The predictions whose masks are known and fit, and notes on the others."""
    usable, notes = [], []
    for sample, prediction in predictions:
        try:
            if saturations is not None:
                _regions(sample, prediction, saturations)
            if sample.mask(prediction.shape) is not None:
                usable.append((sample, prediction))
        except DataError as error:
            notes.append(f"Left out of the pixel metrics: {error}")
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"Left out of the pixel metrics: {len(notes) - MAX_NOTES} more, for such reasons."]
    if saturations is None:
        masks = [path for sample, _ in usable for path in sample.masks]
        notes += about_doubts({path: why for path in masks if (why := read_doubted(path)[1])})
    missing = len(predictions) - len(usable)
    if missing and any(sample.has_mask for sample, _ in usable):
        notes.append(f"{missing} test images have no usable mask; pixel metrics leave them out.")
    return usable, notes


def _restored(prediction: "Prediction") -> npt.NDArray[np.float32]:
    """The anomaly map over the photograph, not kept."""
    return prediction.map_of(prediction.shape)


def _mask(sample: Sample, prediction: "Prediction") -> npt.NDArray[np.bool_]:
    mask = sample.mask(prediction.shape)
    assert mask is not None
    return mask


def _regions(sample: Sample, prediction: "Prediction", saturations: Saturations | None) -> list[Region]:
    if not sample.is_anomalous:
        return []
    drawn = [
        Region(pixels, int(pixels.sum())) for shape in sample.shapes if (pixels := shape.drawn(prediction.shape)).any()
    ]
    return [*read_regions(sample.masks, prediction.shape, saturations), *drawn]


@dataclass(frozen=True)
class _Repeatable(Generic[Item]):
    """Items that are made anew each time one goes through them, so that they need no memory."""

    make: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        return self.make()


def _map_names(samples: Sequence[Sample], folder: Path, root: Path) -> dict[Sample, Path]:
    """<folder>/<defect>/<stem>.tiff, with as many parent folders in the stem as tell the images apart."""

    def stem(sample: Sample, depth: int) -> str:
        path = PurePosixPath(sample.name(root))
        name = path.stem if sample.index is None else f"{path.stem}_{sample.index}"
        return "_".join([*path.parts[-depth:-1], name if depth < MAX_DEPTH else path.name]).replace("/", "_")

    for depth in range(1, MAX_DEPTH + 1):
        targets = {
            sample: folder / sample.defect / files.short_name(stem(sample, depth), ".tiff") for sample in samples
        }
        if len(set(targets.values())) == len(targets):
            break
    return targets


def _pictures(predictions: "Sequence[tuple[Sample, Prediction]]", root: Path, seed: int) -> list[Picture]:
    """The worst misses, the worst false alarms and a random sample of the rest."""
    by_score = sorted(predictions, key=lambda pair: pair[1].score)
    misses = [pair for pair in by_score if pair[0].is_anomalous and pair[1].verdict == "pass"]
    alarms = [pair for pair in reversed(by_score) if not pair[0].is_anomalous and pair[1].is_anomalous]
    shown = {"miss": misses[: PICTURES["miss"]], "false alarm": alarms[: PICTURES["false alarm"]]}
    taken = {id(pair) for pairs in shown.values() for pair in pairs}
    rest = [pair for pair in predictions if id(pair) not in taken]
    chosen = np.random.default_rng(seed).permutation(len(rest))[: PICTURES["sample"]]
    shown["sample"] = [rest[index] for index in sorted(chosen)]
    return [_picture(sample, prediction, root, why) for why, pairs in shown.items() for sample, prediction in pairs]


def _picture(sample: Sample, prediction: "Prediction", root: Path, why: str) -> Picture:
    photo = image.small(prediction.photograph(), PICTURE_SIDE)
    if prediction.detector.preprocessing.tiling is None:
        anomaly_map = image.resize_map(prediction.anomaly_map, photo.shape[:2])
    else:  # the map over all of a large photograph is not made for a small picture
        anomaly_map = prediction.map_of(photo.shape[:2])
    low, high = prediction.detector.heat_map_range
    glow = image.overlay(photo, anomaly_map, low, high, prediction.detector.pixel_threshold)
    shown, heat, overlay = (image.data_uri(part) for part in (photo, image.heat(anomaly_map, low, high), glow))
    pairs = []
    if prediction.is_anomalous or prediction.regions:
        for evidence in prediction.why()[:MAX_PAIRS]:
            query, match = (
                "" if crop is None else image.data_uri(crop) for crop in (evidence.query_crop, evidence.match_crop)
            )
            pairs.append(PatchPair(evidence.region, query, match, evidence.nearest.image, evidence.nearest.distance))
    return Picture(sample.name(root), why, shown, heat, overlay, pairs)


def _zones(detector: "Inspector", samples: Sequence[Sample]) -> dict[str, str]:
    """A photograph with the zones on it, as it lies or in the pose that all are turned to, and a sentence of each."""
    zones = detector.preprocessing.zones
    if zones is None:
        return {}
    limits = [f"{limit:.4g} in {name}" for name, limit in detector.zone_thresholds.items()]
    sentences = [f"A part is stopped where its score is above {', '.join(limits)}."] if limits else []
    own = [f"{one_in(zone.false_alarms)} in {zone.name}" for zone in detector.config.zones if zone.false_alarms]
    if own:
        sentences.append(f"Of good parts, {', '.join(own)} may be stopped.")
    ignored = (zones.numbers < 0).mean()
    if ignored:
        sentences.append(f"{percent(float(ignored))} of the frame is not inspected: the model is shown nothing of it.")
    for item in [*filter(None, detector.good_items), *samples]:
        try:
            photo = image.small(detector.preprocessing.read(item)[0], 2 * PICTURE_SIDE)
        except BadImage:
            continue
        alignment = detector.preprocessing.alignment
        upright = photo if alignment is None else turned(photo, alignment.pose(photo), photo.shape[:2])
        picture = zones_picture(upright, detector.config.zones)
        return {"picture": image.data_uri(picture), "sentence": " ".join(sentences)}
    return {"picture": "", "sentence": " ".join(sentences)}


def _outliers(detector: "Inspector") -> list[Outlier]:
    """The training images for a second look, the worst first, those shown with a picture."""
    outliers: list[Outlier] = []
    for suspect in sorted(detector.training.get("suspects", ()), key=lambda suspect: -float(suspect["score"])):
        picture = detector.picture(suspect["number"]) if len(outliers) < MAX_OUTLIERS else None
        small = "" if picture is None else image.data_uri(image.resize(picture, (PICTURE_SIDE // 2, PICTURE_SIDE // 2)))
        outliers.append(Outlier(suspect["name"], suspect["score"], small))
    return outliers
