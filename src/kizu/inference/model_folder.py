"""A model's folder: where it is, what lies in it, and `load`, for trained and exported models."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizu.data import files
from kizu.errors import ModelError, OptionError, require

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["FORMAT", "THUMBNAILS", "description", "load", "model_folder", "thumbnails", "write_thumbnails"]

FORMAT = 2
MAX_DESCRIPTION_BYTES = 10**9
MAX_MODEL_BYTES = 10**12
THUMBNAILS = "thumbnails.safetensors"


def load(folder: str | os.PathLike[str]) -> "Inspector":
    """Read a model, trained or exported; a trained one needs torch. Nothing in the folder is executed.

    Raises `ModelError` where there is no model, where it is damaged, and where an exported one does not reproduce
    itself.
    """
    home = "kizu.inference.exported" if "export" in description(folder) else "kizu.detectors.loading"
    model: Inspector = require(home).load(folder)
    return model


def description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What model.json says. Raises `ModelError` where it is missing, damaged or of another version of kizu."""
    try:
        files.check_regular(Path(folder) / "model.json", MAX_DESCRIPTION_BYTES)
        for path in Path(folder).glob("*.*"):
            if not path.is_dir():
                files.check_regular(path, MAX_MODEL_BYTES)
        about = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{folder} is not a kizu model: model.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder}: the model is damaged ({str(error) or type(error).__name__})") from None
    if not isinstance(about, dict):
        raise ModelError(f"{folder}: the model is damaged (model.json holds no object)")
    if about.get("format") != FORMAT:
        raise ModelError(f"{folder}: written by another version of kizu (format {about.get('format')}, not {FORMAT})")
    return about


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


def model_folder(path: str, category: str | None = None) -> Path:
    """A model's folder, from itself, a run's folder or a run's models folder; `category` picks one of several."""
    folder = Path(path)
    if (folder / "model.json").exists():
        return folder
    models = folder / "models" if (folder / "models").is_dir() else folder
    names = sorted(candidate.parent.name for candidate in models.glob("*/model.json")) if models.is_dir() else []
    if category in names:
        return models / str(category)
    if len(names) == 1:
        return models / names[0]
    if not names:
        raise OptionError(f"{path}: there is no kizu model (a folder with model.json and model.safetensors)")
    raise OptionError(f"{path} holds {len(names)} models; name one: {', '.join(str(models / name) for name in names)}")
