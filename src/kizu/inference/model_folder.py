"""A model's folder: where it is, what lies in it, and `load`, for trained and exported models."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizu.data import files
from kizu.errors import ModelError, OptionError, require

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["THUMBNAILS", "description", "load", "model_folder", "thumbnails", "version", "write_thumbnails"]

MAX_MODEL_BYTES = 10**12
THUMBNAILS = "thumbnails.safetensors"
TRIES = 5  # to read a folder that is being replaced


def load(folder: str | os.PathLike[str]) -> "Inspector":
    """Read a model, trained or exported; a trained one needs torch. Nothing in the folder is executed.

    The folder of a run stands for its model. Raises `OptionError` where it has several, and `ModelError` where there is
    no model, where it is damaged, and where an exported one does not reproduce itself.
    """
    if not Path(folder, "model.json").exists() and any(Path(folder).glob("models/*/model.json")):
        folder = model_folder(folder)
    for tries_left in reversed(range(TRIES)):
        before = _state(folder)
        try:
            home = "kizu.inference.exported" if "export" in description(folder) else "kizu.detectors.loading"
            model: Inspector = require(home).load(folder)
            return model
        except ModelError:
            if _state(folder) == before or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What model.json says. Raises `ModelError` where it is missing, damaged or of another version of kizu."""
    from kizu.inference import model_json

    folder = Path(folder)
    files.recover(folder)
    try:
        for path in folder.glob("*.*"):
            if not path.is_dir():
                files.check_regular(path, MAX_MODEL_BYTES)
    except OSError as error:
        raise ModelError(f"{folder}: the model is damaged ({path.name}: {error.strerror})") from None
    return model_json.read(folder)


def version(folder: Path) -> str:
    """What tells a model from any other, and from itself before it was changed: a hash of model.json."""
    return hashlib.blake2b((folder / "model.json").read_bytes(), digest_size=6).hexdigest()


def thumbnails(folder: Path) -> list[bytes]:
    """The encoded pictures of the training images; none if the model keeps no thumbnails."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        encoded = load_file(folder / THUMBNAILS) if (folder / THUMBNAILS).exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None
    return [encoded[key].tobytes() for key in sorted(encoded)]


def write_thumbnails(folder: Path, pictures: Sequence[bytes]) -> None:
    """Write encoded pictures so that `thumbnails` reads them."""
    import numpy as np
    from safetensors.numpy import save_file

    encoded = {f"{number:06}": np.frombuffer(picture, np.uint8) for number, picture in enumerate(pictures)}
    save_file(encoded, folder / THUMBNAILS)


def model_folder(path: str | os.PathLike[str], category: str | None = None) -> Path:
    """A model's folder, from itself, a run's folder or a run's models folder; `category` picks one of several."""
    folder = Path(path)
    files.recover(folder)
    if (folder / "model.json").exists():
        return folder
    models = folder / "models" if (folder / "models").is_dir() else folder
    names = sorted(candidate.parent.name for candidate in models.glob("*/model.json")) if models.is_dir() else []
    if category in names:
        return models / str(category)
    if len(names) == 1:
        return models / names[0]
    if not names:
        raise OptionError(
            f"{path}: there is no kizu model here: give a model's folder, which holds model.json, or a run's"
        )
    raise OptionError(f"{path} holds {len(names)} models; name one: {', '.join(str(models / name) for name in names)}")


def _state(folder: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What changes when a model is replaced by another one."""
    try:
        status = (Path(folder) / "model.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
