"""Every hyper-parameter of every method: validated objects that become options, keyword arguments, JSON and help."""

from kizu.config.base import Augmented, BackboneConfig, Config, OtherConfig, build
from kizu.config.distillation import DistillationConfig
from kizu.config.efficientad import EfficientADConfig
from kizu.config.patchcore import PatchCoreConfig
from kizu.config.puad import PUADConfig
from kizu.config.simplenet import SimpleNetConfig
from kizu.config.zones import Zone

__all__ = [
    "CONFIGS",
    "Augmented",
    "BackboneConfig",
    "Config",
    "DistillationConfig",
    "EfficientADConfig",
    "OtherConfig",
    "PUADConfig",
    "PatchCoreConfig",
    "SimpleNetConfig",
    "Zone",
    "build",
]

CONFIGS: dict[str, type[Config]] = {
    "patchcore": PatchCoreConfig,
    "simplenet": SimpleNetConfig,
    "efficientad": EfficientADConfig,
    "puad": PUADConfig,
}
