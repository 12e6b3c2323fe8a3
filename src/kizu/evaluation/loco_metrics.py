"""Metrics as MVTec LOCO defines them: logical and structural anomalies apart, each against all good images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.data.masks import Region
from kizu.evaluation.metrics import Reasons, Values, au_spro, image_metrics

__all__ = ["BY_TYPE", "LIMITS", "NO_CONFIG", "TYPES", "applies", "detection", "localisation", "spro_key"]

TYPES = {"logical": "logical_anomalies", "structural": "structural_anomalies"}  # short name → type of defect
LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)  # false-positive rates up to which sPRO is integrated
BY_TYPE = ("image_auroc", "map_auroc")  # of detector scores; of the maps' maxima, as MVTec's scripts do
NO_CONFIG = (
    "There is no defects_config.json, so each mask file is taken as one region that has to be found whole. AU-sPRO is "
    "then not comparable with published figures; `defects_config=FILE` gives the saturation thresholds."
)

Floats = npt.NDArray[np.floating[Any]]


def applies(defects: Iterable[str]) -> bool:
    """Whether test images have a type of defect that LOCO tells apart."""
    return not set(TYPES.values()).isdisjoint(defects)


def spro_key(limit: float, kind: str = "by_type") -> str:
    """The name of a value: au_spro_by_type_0.05, au_spro_logical_0.05, …"""
    return f"au_spro_{kind}_{limit}"


def detection(defects: Sequence[str], scores: Sequence[float], peaks: Sequence[float]) -> tuple[Values, Reasons]:
    """Image AUROC of each type against the good images, and the mean of the two.

    `scores` are the detector's, giving image_auroc_…; `peaks` the maxima of its maps, giving map_auroc_….
    """
    values: Values = {}
    reasons: Reasons = {}
    for name, numbers in zip(BY_TYPE, (scores, peaks), strict=True):
        for kind, defect in TYPES.items():
            chosen = [index for index, label in enumerate(defects) if label in (defect, "good")]
            labels = [defects[index] == defect for index in chosen]
            kind_values, why = image_metrics([numbers[index] for index in chosen], labels)
            values[f"{name}_{kind}"] = kind_values["image_auroc"]
            if why:
                reasons[f"{name}_{kind}"] = why["image_auroc"] if any(labels) else _absent(kind)
        _average(values, reasons, f"{name}_by_type", [f"{name}_{kind}" for kind in TYPES])
    return values, reasons


def localisation(
    defects: Sequence[str], image: Callable[[int], tuple[Floats, Sequence[Region]]]
) -> tuple[Values, Reasons]:
    """AU-sPRO of each type with the good images, up to each limit, and the mean of the two.

    `image` gives the map (H, W) and the regions of an index; it is asked for each up to four times.
    """
    values: Values = {}
    reasons: Reasons = {}
    for kind, defect in TYPES.items():
        chosen = [index for index, label in enumerate(defects) if label in (defect, "good")]

        def images(chosen: Sequence[int] = chosen) -> Iterator[tuple[Floats, Sequence[Region]]]:
            return map(image, chosen)

        areas, why = au_spro(images, LIMITS)
        keys = [spro_key(limit, kind) for limit in LIMITS]
        if areas is None:
            values |= dict.fromkeys(keys)
            reasons |= dict.fromkeys(keys, why if defect in defects else _absent(kind))
        else:
            values |= dict(zip(keys, areas, strict=True))
    for limit in LIMITS:
        _average(values, reasons, spro_key(limit), [spro_key(limit, kind) for kind in TYPES])
    return values, reasons


def _absent(kind: str) -> str:
    return f"there are no test images of {kind} anomalies"


def _average(values: Values, reasons: Reasons, name: str, parts: Sequence[str]) -> None:
    """Add the mean of some values, None where one is missing."""
    known = [value for part in parts if (value := values[part]) is not None]
    values[name] = sum(known) / len(known) if len(known) == len(parts) else None
    if values[name] is None:
        reasons[name] = "there are not both logical and structural anomalies to average"
