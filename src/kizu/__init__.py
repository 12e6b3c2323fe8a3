"""kizu (傷, a flaw): visual inspection learned from photographs of good parts only."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kizu.detectors.detector import Detector
    from kizu.detectors.efficientad import EfficientAD
    from kizu.detectors.patchcore import PatchCore
    from kizu.detectors.puad import PUAD
    from kizu.detectors.simplenet import SimpleNet
    from kizu.errors import BadImage, DataError, KizuError, MissingExtra, ModelError, OptionError
    from kizu.inspector import Inspector, Photo, Prediction
    from kizu.saved import load

__all__ = ["PUAD", "BadImage", "DataError", "Detector", "EfficientAD", "Inspector", "KizuError", "MissingExtra"]
__all__ += ["ModelError", "OptionError", "PatchCore", "Photo", "Prediction", "SimpleNet", "__version__", "load"]

__version__ = "0.1.0"

_HOMES = {
    "kizu.detectors.detector": ("Detector",),
    "kizu.detectors.efficientad": ("EfficientAD",),
    "kizu.detectors.patchcore": ("PatchCore",),
    "kizu.detectors.puad": ("PUAD",),
    "kizu.detectors.simplenet": ("SimpleNet",),
    "kizu.errors": ("BadImage", "DataError", "KizuError", "MissingExtra", "ModelError", "OptionError"),
    "kizu.inspector": ("Inspector", "Photo", "Prediction"),
    "kizu.saved": ("load",),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `import kizu` stays light."""
    for module, names in _HOMES.items():
        if name in names:
            from kizu.errors import require

            return getattr(require(module), name)
    raise AttributeError(f"module 'kizu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
