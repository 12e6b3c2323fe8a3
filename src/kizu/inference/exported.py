"""Exported models: verdicts from a graph in onnxruntime or OpenVINO, without torch.

An exported model has some photographs inside, and checks at load that it still says of them what the trained one said.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kizu.calibration.threshold import p_value
from kizu.data import image
from kizu.data.preprocessing import Preprocessing
from kizu.errors import ModelError
from kizu.inference import model_folder, model_json
from kizu.inference.engines import Run, open_graph
from kizu.inference.evidence import BankOutputs, nearest_patch
from kizu.inference.image_features import GlobalFeatures
from kizu.inference.inspector import Inspector
from kizu.inference.parity import Cases, Difference, Tolerance
from kizu.inference.prediction import NearestPatch

__all__ = ["CASES", "OWN_VERDICTS", "TABLES", "Exported", "load"]

CASES = "parity.safetensors"
TABLES = "keepsakes.safetensors"  # what explains a score and a map: `Detector.export_tables`
CASES_AT_LOAD = 2  # that are checked
BATCH = 8  # images in one run of the graph: more take memory and are no faster
ROUNDING = 1e-6
OWN_VERDICTS = "p_value", "verdict"  # that a graph gives, unless its score is not what is compared with the threshold

Arrays = dict[str, npt.NDArray[Any]]


class Exported(Inspector):
    """A model that `kizu export` wrote. It judges as the trained one does, and cannot learn or be changed."""

    def __init__(self, folder: Path, about: dict[str, Any], run: Run, tables: Arrays) -> None:
        super().__init__(Preprocessing.of(about["config"]), about["threshold"]["rate"])
        self.method: str = about["method"]
        self.folder, self.about = folder, about
        self.export: dict[str, Any] = about["export"]
        self._run, self._tables = run, tables
        self.restore_thresholds(about)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: everything but the graph, which is read from the folder again."""
        return self.__dict__ | {"_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_run": open_graph(state["folder"], state["export"]["format"])}

    @cached_property
    def config(self) -> Any:
        """The method's hyper-parameters, as of the trained model."""
        from kizu.config import CONFIGS, OtherConfig, build

        return build(CONFIGS.get(self.method, OtherConfig), self.about["config"])

    @property
    def tolerance(self) -> Tolerance:
        """How far scores and maps may differ from torch's."""
        return Tolerance(**self.export["parity"]["tolerance"])

    @property
    def promise(self) -> str:
        """What the comparison with torch gave at export, in a sentence."""
        difference = Difference(**self.export["parity"]["compared"])
        return f"{self.export['format']}, {self.export['precision']}: {difference.sentence(self.tolerance)}."

    def outputs(self, pixels: npt.NDArray[np.uint8], names: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The outputs called `names` of the graph for images (B, 3, h, w); `export["outputs"]` lists all names."""
        parts = [self._run(pixels[start : start + BATCH], names) for start in range(0, len(pixels), BATCH)]
        return [np.concatenate(values) for values in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[image.Float, image.Float]:
        scores, maps = self.outputs(pixels, ("score", "map"))
        return scores, maps

    def score_in_parts(self, pixels: npt.NDArray[np.uint8]) -> tuple[image.Float, image.Float, list[dict[str, Any]]]:
        names = ("parts", "contributions", "whitened")
        if names[0] not in self.export["outputs"]:
            return super().score_in_parts(pixels)
        scores, maps, *extras = self.outputs(pixels, ("score", "map", *names))
        features = GlobalFeatures(**self._tables, groups=list(self.facts["groups"]), names=self.training["names"])
        return scores, maps, features.explain(*extras)

    def nearest_good(self, seen: npt.NDArray[np.uint8], place: tuple[float, float]) -> NearestPatch | None:
        banks = BankOutputs.among(self.export["outputs"])
        if not banks:
            return None
        names = [name for bank in banks for name in (bank.entries, bank.distances)]
        outputs = self.outputs(np.ascontiguousarray(seen.transpose(2, 0, 1)[None]), names)
        share = place[0] / seen.shape[1], place[1] / seen.shape[0]
        return nearest_patch(dict(zip(names, outputs, strict=True)), self._tables, share, self.names)

    def verify(self, max_cases: int | None = None) -> Difference:
        """Judge the photographs inside again, all or the first `max_cases`, and compare with what torch said.

        Raises `ModelError` where an outcome, a verdict or a p-value differs by more than the model's tolerance.
        """
        tolerance = self.tolerance
        cases = Cases.read(self.folder / CASES)
        cases = cases.take(range(len(cases.scores))[:max_cases])
        own = [name for name in OWN_VERDICTS if name in self.export["outputs"]]
        scores, maps, *outcomes = self.outputs(cases.images, ("score", "map", *own))
        scores = self.ruled(scores, maps)
        difference = cases.difference(scores, maps, self.threshold.value, tolerance)
        if not difference.within(tolerance):
            sentence = difference.sentence(tolerance)
            raise ModelError(
                f"{self.folder} does not give the results that it gave when it was exported: {sentence}. Export the "
                "trained model again"
            )
        if own:
            p_values, verdicts = outcomes
            expected = [p_value(float(score), self.calibration_scores) for score in scores]
            stopped = [bool(score > self.threshold.value) for score in scores]
            if np.abs(p_values - expected).max() > ROUNDING or verdicts.tolist() != stopped:
                raise ModelError(f"{self.folder}: model.json and the graph disagree on the threshold. Export it again")
        return difference

    def save(self, folder: str | os.PathLike[str]) -> Path:
        raise ModelError(
            f"{self.folder} is an exported model, which cannot be changed: change the trained one and export it again"
        )


def load(folder: str | os.PathLike[str], *, check: int | None = CASES_AT_LOAD) -> Exported:
    """Read an exported model and check it on `check` of the photographs inside; None is all, 0 is none.

    Raises `ModelError` where a file is missing, was changed, or the model does not reproduce itself, and `MissingExtra`
    where what runs it is not installed.
    """
    folder = Path(folder)
    about = model_folder.description(folder)
    if "export" not in about:
        raise ModelError(f"{folder} is a trained model: open it with kizu.load, or export it")
    with model_json.checking(folder, about):  # ends before anything of it is run
        tables, pictures = _tables(folder), model_folder.thumbnails(folder)
    model = Exported(folder, about, open_graph(folder, about["export"]["format"]), tables)
    model.thumbnails = pictures
    if check != 0:
        model.verify(check)
    return model


def _tables(folder: Path) -> Arrays:
    try:
        tables: Arrays = load_file(folder / TABLES) if (folder / TABLES).exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None
    for name, table in tables.items():
        if table.dtype.kind == "f" and table.size > 1 and not np.isfinite(table).all():
            raise ModelError(f"{folder}: the model is damaged ({name} holds values that are no finite numbers)")
    return tables
