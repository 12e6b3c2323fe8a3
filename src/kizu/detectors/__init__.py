"""Detectors by name. Each is one file; `DETECTORS` says where, so that none is imported before it is needed."""

from typing import TYPE_CHECKING

from kizu.errors import OptionError, require

if TYPE_CHECKING:
    from kizu.detectors.base import Detector

__all__ = ["DETECTORS", "detector_class"]

DETECTORS = {
    "patchcore": ("kizu.detectors.patchcore.detector", "PatchCore"),
    "simplenet": ("kizu.detectors.simplenet.detector", "SimpleNet"),
    "efficientad": ("kizu.detectors.efficientad.detector", "EfficientAD"),
    "puad": ("kizu.detectors.puad.detector", "PUAD"),
}


def detector_class(method: str) -> "type[Detector]":
    """The class of a method. Raises `OptionError` for a name that is none, `MissingExtra` where torch is missing."""
    if method not in DETECTORS:
        raise OptionError(f"{method} is not a method; there are: {', '.join(DETECTORS)}")
    module, name = DETECTORS[method]
    found: type[Detector] = getattr(require(module), name)
    return found
