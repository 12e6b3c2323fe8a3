"""Feedback: photographs that people marked good or bad, in folders that `kizu update` and `kizu tune` take."""

import hashlib
import re
from pathlib import Path
from typing import Literal

from kizu.data import files, image
from kizu.serving.batcher import Upload

__all__ = ["Label", "collect", "count"]

Label = Literal["good", "bad"]


def count(folder: Path) -> tuple[int, int]:
    """How many photographs are marked good, and how many bad."""
    good, bad = (sum(1 for _ in (folder / label).glob("*")) for label in ("good", "bad"))
    return good, bad


def collect(folder: Path, upload: Upload, label: Label) -> Path:
    """Write an upload to <folder>/<label>, byte for byte; one that was marked otherwise before moves.

    Raises `BadImage` when it cannot be read.
    """
    image.read(upload.content, large=True)
    digest = hashlib.blake2b(upload.content, digest_size=8).hexdigest()
    before = [path for other in ("good", "bad") for path in (folder / other).glob(f"*{digest}.*")]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(upload.name).stem).strip("-")[:40]
    name = f"{stem}-{digest}".lstrip("-") + (image.suffix_of(upload.content) or ".png")
    target = folder / label / (before[0].name if before else name)
    for path in before:
        if path != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    if not target.exists():
        with files.new_file(target) as temporary:
            temporary.write_bytes(upload.content)
    return target
