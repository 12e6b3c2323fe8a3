"""Methods by name: those of kizu, and those that other packages announce. None is imported before it is needed."""

from typing import TYPE_CHECKING, cast

from kizu.errors import OptionError, require

if TYPE_CHECKING:
    from kizu.config import Config
    from kizu.detectors.base import Detector

__all__ = ["DETECTORS", "config_class", "detector_class", "methods"]

DETECTORS = {
    "patchcore": ("kizu.detectors.patchcore.detector", "PatchCore"),
    "simplenet": ("kizu.detectors.simplenet.detector", "SimpleNet"),
    "efficientad": ("kizu.detectors.efficientad.detector", "EfficientAD"),
    "puad": ("kizu.detectors.puad.detector", "PUAD"),
}


def methods() -> dict[str, str]:
    """Every method's name, and what it is in a line."""
    from kizu.config import CONFIGS
    from kizu.config.plugins import plugins, summary

    lines = {name: (config.__doc__ or "").split("\n")[0].rstrip(".") for name, config in CONFIGS.items()}
    others = {name: summary(plugin) for name, plugin in plugins("kizu.detectors").items() if name not in lines}
    return lines | others


def detector_class(method: str) -> "type[Detector]":
    """The class of a method.

    Raises `OptionError` for a name that is none or a plug-in that cannot be loaded, `MissingExtra` where torch is
    missing.
    """
    if method in DETECTORS:
        module, name = DETECTORS[method]
        cls: type[Detector] = getattr(require(module), name)
        return cls
    return _from_plugin(method)


def config_class(method: str) -> "type[Config]":
    """The class of a method's hyper-parameters, for kizu's own methods without torch. Raises as `detector_class`."""
    from kizu.config import CONFIGS

    return CONFIGS[method] if method in CONFIGS else detector_class(method).config_class


def _from_plugin(method: str) -> "type[Detector]":
    from kizu.config.plugins import load, plugins

    plugin = plugins("kizu.detectors").get(method)
    if plugin is None:
        raise OptionError(f"{method} is not a method that is installed; there are: {', '.join(methods())}")
    require("torch")
    cls = load(plugin)
    if not _is_detector(cls, method):
        raise OptionError(
            f'{plugin.value} should be a class derived from kizu.Detector, with method = "{method}" and a config_class'
        )
    return cast("type[Detector]", cls)


def _is_detector(cls: object, method: str) -> bool:
    from kizu.config import Config
    from kizu.detectors.base import Detector

    if not (isinstance(cls, type) and issubclass(cls, Detector) and getattr(cls, "method", None) == method):
        return False
    return isinstance(settings := getattr(cls, "config_class", None), type) and issubclass(settings, Config)
