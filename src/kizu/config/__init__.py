"""Every hyper-parameter of every method: validated objects that become options, keyword arguments, JSON and help."""

from kizu.config.base import (
    CONFIGS,
    Augmented,
    BackboneConfig,
    Config,
    DistillationConfig,
    EfficientADConfig,
    OtherConfig,
    PatchCoreConfig,
    PUADConfig,
    SimpleNetConfig,
    build,
)

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
    "build",
]
