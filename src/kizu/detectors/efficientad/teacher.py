"""EfficientAD's teachers: read from our files and from those of others, written to ours."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kizu.data import files
from kizu.detectors.efficientad.networks import KERNELS, PDN, Size
from kizu.errors import ModelError, OptionError
from kizu.features.safe_load import read_tensors

__all__ = ["SHIPPED", "assemble", "fingerprint", "load", "save"]

SHIPPED = Path(__file__).with_name("efficientad-s.safetensors")
MISSING = (
    "`network=m` needs a teacher, and there are two ways to one: take a trained one (`teacher=FILE`, of nelson1425's, "
    "anomalib's or PUAD's), or make one of this size from photographs of anything:  kizu distill PHOTOS"
)
WORDS: dict[Size, str] = {"s": "small", "m": "medium"}


def load(path: str | Path | None, size: Size = "s") -> tuple[PDN, dict[str, Any]]:
    """A teacher from a file, or from a folder or zip archive with one of each size; and what is known of it.

    None: the one that comes with kizu, of size s. Files: safetensors of `kizu distill`, or what torch.save wrote, be it
    a state dict or a whole module (nothing in it is run). Folders and archives: those of nelson1425's, anomalib's and
    PUAD's teachers. Raises `ModelError`.
    """
    if path is None and size != "s":
        raise ModelError(MISSING)
    path = SHIPPED if path is None else Path(path)
    about: dict[str, Any] = {}
    if path.is_dir():
        path = path / _one_of(
            [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()], size, path
        )
    if not path.is_file():
        raise ModelError(f"{path}: there is no such teacher")
    if path.suffix == ".safetensors":
        state, about = _read_own(path)
    elif inside := _files_in(path):
        entry = _one_of(inside, size, path)
        with zipfile.ZipFile(path) as archive:
            state = read_tensors(io.BytesIO(archive.read(entry)), f"{path}: {entry}")
    else:
        state = read_tensors(path)
    return assemble(state, str(path)), {"file": path.name, **about}


def save(path: Path, teacher: PDN, about: dict[str, Any]) -> None:
    """Write a teacher in half precision as safetensors, with what is known of it, whole or not at all."""
    state = {key: tensor.detach().half().cpu().contiguous() for key, tensor in teacher.state_dict().items()}
    with files.new_file(path) as temporary:
        save_file(state, temporary, metadata={"kizu": json.dumps(about, ensure_ascii=False)})


def assemble(state: Mapping[str, Tensor], origin: str) -> PDN:
    """The network whose convolutions these are, whatever their names. Raises `ModelError` when they are no PDN's."""
    weights = [(key, state[key]) for key in sorted(state, key=_natural) if state[key].ndim == 4]
    biases = [state.get(f"{key.removesuffix('weight')}bias") for key, _ in weights]
    kernels = tuple(weight.shape[2] for _, weight in weights)
    size = next((size for size, known in KERNELS.items() if known == kernels), None)
    if size is None:
        raise ModelError(
            f"{origin} is no teacher of EfficientAD (convolutions of sides {kernels or 'none'}): give a teacher's file"
        )
    channels = [weight.shape[0] for _, weight in weights]
    head = 1 if size == "s" else 2
    network = PDN(size, channels[-1], channels[:-head])
    for layer, (key, weight), bias in zip(network.layers, weights, biases, strict=True):
        if weight.shape != layer.weight.shape or bias is None or bias.shape != weight.shape[:1]:
            raise ModelError(f"{origin}: {key} of shape {tuple(weight.shape)} does not fit into PDN-{size.upper()}")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ModelError(
                f"{origin}: {key} holds values that are no finite numbers: take another copy of the teacher"
            )
        layer.weight.data, layer.bias.data = weight.float(), bias.float()  # type: ignore[union-attr]
    return network.eval().requires_grad_(False)


def _read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata.get("kizu", "{}"))  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: the teacher is damaged ({error})") from None


def _files_in(path: Path) -> list[str]:
    """Names in a zip archive of files; none for a checkpoint, which is a zip archive too, or for anything else."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return [] if any(name.rpartition("/")[2] == "data.pkl" for name in names) else names


def _one_of(names: list[str], size: Size, where: Path) -> str:
    """The teacher of a size among file names in the layouts that are known."""
    pattern = re.compile(
        rf"(.*/)?((pretrained_)?teacher_{WORDS[size]}\.pth|{size}_size/teacher/teacher\.pt|"
        rf"efficientad-{size}\.safetensors)"
    )
    matches = sorted(name for name in names if pattern.fullmatch(name))
    if not matches:
        raise ModelError(
            f"{where}: holds no teacher of size {size}; known are teacher_{WORDS[size]}.pth, "
            f"pretrained_teacher_{WORDS[size]}.pth, {size}_size/teacher/teacher.pt, efficientad-{size}.safetensors"
        )
    if len(matches) > 1:
        raise OptionError(f"{where} holds {len(matches)} teachers of size {size}; name one: {', '.join(matches)}")
    return matches[0]


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sorts "conv10" behind "conv9"."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", key) if part]


def fingerprint(teacher: PDN) -> str:
    """A hash of all numbers of a teacher: tells whether two are the same."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in teacher.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
