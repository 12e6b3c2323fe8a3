"""What every method promises, as checks that a package with a method of its own runs in its tests.

from kizu.testing import check_detector

def test_my_method():
    check_detector(MyMethod, size=64)
"""

import importlib.util
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kizu.errors import BadImage, DataError, KizuError, ModelError, OptionError

if TYPE_CHECKING:
    from kizu.detectors.base import Detector

__all__ = ["CHECKS", "Subject", "check_detector", "photograph"]

SIDE = 96  # pixels of a photograph's sides
DEFECT = (slice(30, 42), slice(50, 62))  # rows and columns of the bright spot
MARGIN = 4  # pixels that the map's peak may lie beside it


def check_detector(cls: "type[Detector]", **settings: Any) -> None:
    """Raise `AssertionError`, with a sentence, where a method does not do what kizu expects of every method.

    The method learns from twelve small photographs that are drawn here, several times: choose `settings`, the keyword
    arguments of `cls`, so that it takes seconds. Export is checked where onnx is installed.
    """
    subject = Subject(cls, settings)
    for check in CHECKS:
        check(subject)


def photograph(seed: int, spot: bool = False) -> npt.NDArray[np.uint8]:
    """A grey disc on a dark table, with noise, (96, 96, 3); a defective one has a bright `spot`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = 40 + 120 * (np.hypot(y - 48, x - 48) < 36) + rng.normal(0, 4, (SIDE, SIDE))
    if spot:
        disc[DEFECT] = 250
    return np.repeat(np.clip(disc, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@dataclass(frozen=True)
class Subject:
    """A method under test: its class and the settings to test it with."""

    cls: "type[Detector]"
    settings: dict[str, Any]

    def new(self, **settings: Any) -> "Detector":
        """A detector that has learned nothing yet."""
        return self.cls(**{**self.settings, **settings})

    @cached_property
    def good(self) -> list[npt.NDArray[np.uint8]]:
        return [photograph(seed) for seed in range(12)]

    @cached_property
    def fitted(self) -> "Detector":
        """A detector that learned from all good photographs."""
        return self.new().fit(self.good)


def check_registration(subject: Subject) -> None:
    """The method is found by its name, which is what loads its saved models."""
    from kizu.detectors import detector_class

    name, cls = subject.cls.method, subject.cls
    try:
        registered: type[Detector] | None = detector_class(name)
    except OptionError:
        registered = None
    _ensure(
        registered is cls,
        f"{cls.__name__} is not registered: install its package with the entry point "
        f'{name} = "{cls.__module__}:{cls.__name__}" in the group kizu.detectors',
    )


def check_settings(subject: Subject) -> None:
    """Settings are described, survive copies, and wrong ones are named."""
    from kizu.config import Config, build

    kind = subject.cls.config_class
    _ensure(issubclass(kind, Config), f"{kind.__name__} should be derived from kizu.config.Config")
    for name, field in kind.model_fields.items():
        _ensure(bool(field.description), f"{kind.__name__}.{name} needs a description: it is the option's help")
    config = subject.new().config
    _ensure(pickle.loads(pickle.dumps(config)) == config, f"A pickled {kind.__name__} should come back equal")
    restored = build(kind, config.model_dump(mode="json"))
    _ensure(restored == config, f"A {kind.__name__} should come back equal from its JSON")
    for name, value in (("size", 8), ("size", "big"), ("false_alarms", 0), ("smoothing", -1), ("no_such_setting", 1)):
        with _refused(OptionError, f"`{name}", f"{name}={value!r}"):
            subject.new(**{name: value})
    with _refused(OptionError, "`resize=100`", "resize=100 for size=128"):
        subject.new(resize=100, size=128)


def check_errors(subject: Subject) -> None:
    """What cannot be done is refused with a sentence."""
    with _refused(ModelError, "fit", "To predict before fit"):
        subject.new().predict(photograph(0))
    with tempfile.TemporaryDirectory() as folder, _refused(ModelError, "fit", "To save before fit"):
        subject.new().save(Path(folder, "model"))
    with _refused(DataError, "no image", "To learn from no image"):
        subject.new().fit([])
    with _refused(DataError, "skip_bad", "To learn from what is no image"):
        subject.new().fit([photograph(0), b"no image"])
    with _refused(BadImage, "image", "To predict what is no image"):
        subject.fitted.predict(b"no image")


def check_defect(subject: Subject) -> None:
    """A defect is found where it is."""
    detector = subject.fitted
    good, defective = detector.predict(photograph(98)), detector.predict(photograph(99, spot=True))
    score, anomaly_map = defective
    _ensure(score == defective.score and anomaly_map is defective.anomaly_map, "A prediction is a score and a map")
    _ensure(score > good.score, "A defective part should score higher than a good one")
    _ensure(defective.is_anomalous and score > defective.threshold, "A part with a bright spot should be stopped")
    _ensure(anomaly_map.shape == (SIDE, SIDE), "The anomaly map should cover the photograph")
    _ensure(anomaly_map.dtype == np.float32, "The anomaly map should be of float32")
    _ensure_peak(anomaly_map, MARGIN)
    _ensure(bool(defective.marked[36, 56]), "The spot should be marked")
    _ensure(not defective.marked[5, 5], "The empty table should not be marked")
    _ensure(defective.overlay().shape == (SIDE, SIDE, 3), "The overlay should have the photograph's size")


def check_graph(subject: Subject) -> None:
    """One graph: uint8 images in, finite scores and maps of float32 out."""
    detector = subject.fitted
    images = np.stack([detector.preprocessing(image).transpose(2, 0, 1) for image in subject.good[:3]])
    scores, maps = detector(images)
    _ensure(scores.shape == (3,), f"Three images should give scores of shape (3,), not {scores.shape}")
    expected = (3, 1, *detector.config.size)
    _ensure(maps.shape == expected, f"Three images should give maps of shape {expected}, not {maps.shape}")
    _ensure(scores.dtype == maps.dtype == np.float32, "Scores and maps should be of float32")
    _ensure(bool(np.isfinite(scores).all() and np.isfinite(maps).all()), "Scores and maps should be finite")


def check_threads(subject: Subject) -> None:
    """Several threads may use the graph at once, an image each: nothing is changed by it."""
    import kizu

    with tempfile.TemporaryDirectory() as folder:
        detector = kizu.load(subject.fitted.save(Path(folder, "model")))  # that has judged nothing yet
    images = np.stack([detector.preprocessing(photograph(seed)).transpose(2, 0, 1) for seed in range(8)])
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(detector, [image[None] for image in images]))
    for number, (scores, maps) in enumerate(together):
        alone = detector(images[number : number + 1])
        same = np.allclose(scores, alone[0], rtol=1e-4) and np.allclose(maps, alone[1], rtol=1e-3, atol=1e-4)
        _ensure(same, f"Image {number} should have the same score and map while other threads judge images")


def check_threshold(subject: Subject) -> None:
    """The threshold follows from good images that were not learned from, by the rate of false alarms."""
    from kizu.calibration.threshold import calibrate

    detector = subject.fitted
    promised = detector.calibrates_with(len(subject.good), 0)
    _ensure(
        detector.threshold.count == promised,
        f"calibrates_with promises {promised} images for the threshold; there are {detector.threshold.count} scores",
    )
    expected = calibrate(detector.calibration_scores, detector.config.false_alarms)
    _ensure(detector.threshold == expected, "The threshold should follow from calibration_scores and false_alarms")
    held_out = subject.new().fit(subject.good[:8], held_out=subject.good[8:])
    _ensure(held_out.training["images"] == 8, "Images held out should not be learned from")
    _ensure(held_out.threshold.count == 4, "Images held out, where there are any, should set the threshold alone")


def check_saved_model(subject: Subject) -> None:
    """A saved model that is loaded gives bit-identical scores and maps."""
    import kizu

    detector = subject.fitted
    with tempfile.TemporaryDirectory() as folder:
        loaded = kizu.load(detector.save(Path(folder, "model")))
    _ensure(type(loaded) is type(detector), f"A saved model should be loaded as {type(detector).__name__}")
    _ensure(loaded.config == detector.config, "A loaded model should have the settings that it was saved with")
    _ensure(loaded.threshold == detector.threshold, "A loaded model should have the threshold that it was saved with")
    for seed in (1, 50):
        before, after = detector.predict(photograph(seed)), loaded.predict(photograph(seed))
        _ensure(before.score == after.score, "A loaded model should give the same scores, to the last bit")
        _ensure(
            np.array_equal(before.anomaly_map, after.anomaly_map),
            "A loaded model should give the same maps, to the last bit",
        )
        _ensure(np.array_equal(before.overlay(), after.overlay()), "A loaded model should draw the same overlays")


def check_reproducible(subject: Subject) -> None:
    """The same photographs and the same seed give the same files."""
    with tempfile.TemporaryDirectory() as folder:
        models = subject.fitted.save(Path(folder, "a")), subject.new().fit(subject.good).save(Path(folder, "b"))
        for name in ("model.safetensors", "model.json"):
            first, second = ((model / name).read_bytes() for model in models)
            _ensure(first == second, f"The same photographs and seed should give the same {name}")


def check_few_images(subject: Subject) -> None:
    """One image, or two, give a finite score, a threshold that says how little it is worth, and plain JSON."""
    import kizu

    for count in (1, 2):
        detector = subject.new().fit(subject.good[:count])
        score = detector.predict(subject.good[5]).score
        _ensure(bool(np.isfinite(score)), f"After {count} good image(s) a score should be finite, not {score}")
        statement = detector.threshold.statement
        _ensure("good images" in statement or "nothing is stopped" in statement, f"This says too little: {statement}")
        with tempfile.TemporaryDirectory() as folder:
            model = detector.save(Path(folder, "model"))
            _ensure(kizu.load(model).threshold == detector.threshold, "A model of few images should be loaded as saved")
            text = (model / "model.json").read_text(encoding="utf-8")
            _ensure(not re.search(r"\b(NaN|Infinity)\b", text), "model.json should have neither NaN nor Infinity")


def check_rectangle(subject: Subject) -> None:
    """Any size of input, wide or high, puts the defect where it is."""
    side = max(subject.new().config.size)
    for size in (f"{side}x{side + 32}", (side + 32, side)):
        detector = subject.new(size=size).fit(subject.good[:3])
        _ensure_peak(detector.predict(photograph(7, spot=True)).anomaly_map, MARGIN + 2)


def check_zones(subject: Subject) -> None:
    """What is ignored changes nothing, to the last bit, and what is inspected is still found."""
    import kizu

    corner = {"name": "corner", "rings": [[(0, 0), (0.4, 0), (0.4, 0.3), (0, 0.3)]], "ignored": True}
    detector = subject.new(zones=[corner]).fit(subject.good)
    photo, defective = photograph(98), photograph(99, spot=True)
    painted = photo.copy()
    painted[: int(0.3 * SIDE) - 4, : int(0.4 * SIDE) - 4] = np.random.default_rng(0).integers(0, 255, 3)
    _ensure(detector.predict(painted) == detector.predict(photo), "What lies in an ignored zone should change nothing")
    _ensure_peak(detector.predict(defective).anomaly_map, MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        again = kizu.load(detector.save(Path(folder, "model")))
        _ensure(again.predict(painted) == detector.predict(photo), "A loaded model should ignore the same zones")


def check_export(subject: Subject) -> None:
    """The exported graph says what torch says. A method that has no exported form raises in `check_exportable`."""
    if any(importlib.util.find_spec(module) is None for module in ("onnx", "onnxscript")):
        return
    from kizu.export import export

    try:
        subject.fitted.check_exportable()
    except ModelError:
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = export(subject.fitted, Path(folder, "exported"), photographs=subject.good[:4])
        defective = exported.predict(photograph(99, spot=True))
    _ensure(defective.is_anomalous, "The exported model should stop a part with a bright spot, as the trained one does")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_registration,
    check_settings,
    check_errors,
    check_defect,
    check_graph,
    check_threads,
    check_threshold,
    check_saved_model,
    check_reproducible,
    check_few_images,
    check_rectangle,
    check_zones,
    check_export,
)


def _ensure(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(f"{sentence}.")


def _ensure_peak(anomaly_map: npt.NDArray[np.float32], margin: int) -> None:
    """The highest place of the map lies on the defect, or at most `margin` pixels beside it."""
    peak = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    inside = all(edge.start - margin <= place <= edge.stop + margin for edge, place in zip(DEFECT, peak, strict=True))
    _ensure(inside, f"The map's peak should lie on the spot; it lies in row {peak[0]}, column {peak[1]}")


@contextmanager
def _refused(kind: type[KizuError], word: str, attempt: str) -> Iterator[None]:
    """The block raises an error of this kind, whose sentence has the word."""
    try:
        yield
    except kind as error:
        _ensure(word in str(error), f"{attempt} should be refused with a sentence that has {word!r}, not: {error}")
    else:
        raise AssertionError(f"{attempt} should raise {kind.__name__}.")
