"""Which files of a folder are photographs, by their names and, where these say nothing, by how they begin."""

import os
from collections.abc import Iterator
from pathlib import Path

from kizu.data import files, image

__all__ = ["FOREIGN", "is_photograph", "is_set_aside", "scan"]

FOREIGN = {".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".crw", ".nef"}
FOREIGN |= {".nrw", ".arw", ".sr2", ".srf", ".raf", ".orf", ".rw2", ".rwl", ".pef", ".srw", ".x3f", ".3fr", ".iiq"}
OTHER = {".csv", ".json", ".jsonl", ".txt", ".log", ".md", ".xml", ".yaml", ".yml", ".toml", ".ini", ".html", ".pdf"}
OTHER |= {".zip", ".gz", ".tar", ".7z", ".npy", ".npz", ".py", ".db", ".sqlite", ".xlsx", ".docx", ".safetensors"}
SET_ASIDE = {"@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler"}
SET_ASIDE |= {"recycled", "~snapshot", "system volume information", "lost+found", "__macosx", "network trash folder"}
SET_ASIDE |= {"temporary items"}
BEGINNINGS = (b"\xff\xd8\xff", image.PNG_SIGNATURE, b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x0a")
BRANDS = {b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc", b"crx ", b"jxl "}
MAX_BYTES = 10**12


def scan(folder: Path) -> Iterator[Path]:
    """The photographs below a folder, sorted; links to folders are followed once.

    A folder below it that cannot be opened comes as if it were a photograph, so that it is named where it is read.
    """
    yield from sorted(_scan(folder, set()))


def is_photograph(path: str | os.PathLike[str]) -> bool:
    """Whether a person would call a file a photograph, be it one that kizu can read or not.

    Pictures that kizu wrote, of a heat map or of evidence, are none.
    """
    suffix = Path(path).suffix.lower()
    if suffix in OTHER:
        return False
    named = suffix in image.SUFFIXES or suffix in FOREIGN
    if named and suffix != ".png":
        return True
    try:
        files.check_regular(path, MAX_BYTES)
        with open(path, "rb") as file:  # noqa: PTH123
            start = file.read(image.MARK_WITHIN)
    except OSError:
        return named
    return not image.is_marked(start) if named or start.startswith(image.PNG_SIGNATURE) else _begins_like_one(start)


def is_set_aside(name: str) -> bool:
    """Whether a folder, or a file, is hidden, or one in which systems keep thumbnails, copies and what was deleted."""
    return name.startswith(".") or name.casefold() in SET_ASIDE


def _begins_like_one(start: bytes) -> bool:
    container = start[4:8] == b"ftyp" and start[8:12] in BRANDS
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    bitmap = start[:2] == b"BM" and start[6:10] == b"\0\0\0\0"
    return container or webp or bitmap or start.startswith(BEGINNINGS)


def _scan(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = list(folder.iterdir())
    except OSError:
        yield folder
        return
    if (place := (status.st_dev, status.st_ino)) in seen:
        return
    seen.add(place)
    for entry in sorted(entries, key=Path.is_symlink):  # the folder itself before a link to it
        if is_set_aside(entry.name):
            continue
        if entry.is_dir():
            yield from _scan(entry, seen)
        elif is_photograph(entry):
            yield entry
