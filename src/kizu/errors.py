"""What can go wrong, as sentences that name the file or option and the way out.

KizuError
├── OptionError    an option or argument has a value that cannot work
├── DataError      a folder of images is not what it should be
│   └── BadImage   one image cannot be used
├── ModelError     a saved model or a weights file cannot be used
└── MissingExtra   a part of kizu that is not installed
"""

import importlib
from types import ModuleType

__all__ = ["BadImage", "DataError", "KizuError", "MissingExtra", "ModelError", "OptionError", "require"]


class KizuError(Exception):
    """Base of every error that kizu raises on purpose; its message is meant for the user."""


class OptionError(KizuError):
    """An option or argument has a value that cannot work."""


class DataError(KizuError):
    """A folder of images is not what it should be."""


class BadImage(DataError):
    """One image cannot be used. `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class ModelError(KizuError):
    """A saved model or a weights file cannot be used."""


class MissingExtra(KizuError):
    """A part of kizu that is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which belongs to an extra of kizu.

    Raises `MissingExtra` with the install command when it is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"This needs {module.split('.')[0]}, which is not installed: run  pip install 'kizu[{extra}]'"
        ) from None
