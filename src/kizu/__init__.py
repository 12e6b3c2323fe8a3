"""kizu (傷, a flaw): visual inspection learned from photographs of good parts only."""

import os
from typing import TYPE_CHECKING, Any

from kizu.inference.processor import share

if TYPE_CHECKING:
    from kizu.config.zones import Zone
    from kizu.detectors.base import Detector
    from kizu.detectors.efficientad.detector import EfficientAD
    from kizu.detectors.patchcore.detector import PatchCore
    from kizu.detectors.puad.detector import PUAD
    from kizu.detectors.simplenet.detector import SimpleNet
    from kizu.errors import BadImage, DataError, KizuError, MissingExtra, ModelError, OptionError, OutputError
    from kizu.evaluation.choice.choose import Choice, choose
    from kizu.inference.inspector import Inspector
    from kizu.inference.model_folder import load
    from kizu.inference.prediction import Photo, Prediction
    from kizu.inference.zones import read_zones

__all__ = [
    "PUAD",
    "BadImage",
    "Choice",
    "DataError",
    "Detector",
    "EfficientAD",
    "Inspector",
    "KizuError",
    "MissingExtra",
]
__all__ += ["ModelError", "OptionError", "OutputError", "PatchCore", "Photo", "Prediction", "SimpleNet", "__version__"]
__all__ += ["Zone", "choose", "load", "read_zones"]

__version__ = "0.2.0"

_QUIET = {  # packages that report how they are used, some as soon as they are imported, unless they are told not to
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
}
for _switch, _value in _QUIET.items():
    os.environ.setdefault(_switch, _value)
share()

_HOMES = {
    "kizu.config.zones": ("Zone",),
    "kizu.detectors.base": ("Detector",),
    "kizu.detectors.efficientad.detector": ("EfficientAD",),
    "kizu.detectors.patchcore.detector": ("PatchCore",),
    "kizu.detectors.puad.detector": ("PUAD",),
    "kizu.detectors.simplenet.detector": ("SimpleNet",),
    "kizu.errors": ("BadImage", "DataError", "KizuError", "MissingExtra", "ModelError", "OptionError", "OutputError"),
    "kizu.evaluation.choice.choose": ("Choice", "choose"),
    "kizu.inference.inspector": ("Inspector",),
    "kizu.inference.model_folder": ("load",),
    "kizu.inference.prediction": ("Photo", "Prediction"),
    "kizu.inference.zones": ("read_zones",),
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
