"""What other packages add to kizu: methods, backbones and metrics, announced by entry points.

A package is asked what it has only where its name is not one of kizu's own, and imported only when it is used.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from kizu.errors import KizuError, OptionError, missing_extra

__all__ = ["Group", "load", "plugins", "summary"]

Group = Literal["kizu.detectors", "kizu.backbones", "kizu.metrics"]


def plugins(group: Group) -> dict[str, EntryPoint]:
    """The plug-ins of a group by name. None of them is imported."""
    return {plugin.name: plugin for plugin in entry_points(group=group)}


def summary(plugin: EntryPoint) -> str:
    """What the package that brings a plug-in says of itself in a line."""
    about = None if plugin.dist is None else plugin.dist.metadata
    return plugin.value if about is None else about["Summary"] if "Summary" in about else about["Name"]


def load(plugin: EntryPoint) -> Any:
    """The object that a plug-in gives. Raises `OptionError`, or `MissingExtra`, where it cannot be imported."""
    try:
        return plugin.load()
    except Exception as error:  # somebody else's code raises anything
        if isinstance(error, ModuleNotFoundError) and isinstance(missing := missing_extra(error), KizuError):
            raise missing from None
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise OptionError(f"The plug-in {plugin.name} cannot be loaded from {plugin.value} ({reason})") from None
