"""What lies in folders, and what their names say."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kizu.data.photographs import is_photograph, is_set_aside
from kizu.errors import DataError

__all__ = ["Folder", "Names", "is_mask_folder", "walk"]

_GOOD = re.compile(
    "good|ok|normal|nominal|pass|passed|perfect|golden|healthy|intact|no_defects?|defect_free|"
    "gut(e|teile?)?|i\\.?o\\.?|in_ordnung|bon(s|ne|nes)?|buen[oa]s?|buon[oaie]"
)
_BAD = re.compile(
    "bad|ng|nok|ko|nio|no_good|not_(ok|good)|defect(s|ive)?|anomal(y|ies|ous)|abnormal|fail(ed|ures?)?|fault(s|y)?|"
    "reject(s|ed)?|"
    "schlecht(e|teile?)?|n\\.?i\\.?o\\.?|nicht_in_ordnung|ausschuss|ausschuß|fehler(haft(e|es)?|teile?)?|defekte?|"
    "mauvais(es?)?|d[eé]faut(s|ueux)?|mal[oa]s?|defectos?|difett(o|i|osi)"
)
_MASK_FOLDER = re.compile("masks?|ground_?truth|gt|labels")


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, sorted by name."""

    path: Path
    folders: tuple["Folder", ...]
    images: tuple[Path, ...]
    others: tuple[tuple[Path, str], ...]  # what cannot be used, and why

    @property
    def name(self) -> str:
        return self.path.name

    def get(self, *names: str) -> "Folder | None":
        """The first sub-folder with one of these names, whatever its case."""
        return next((inner for inner in self.folders if inner.name.casefold() in names), None)

    def tree(self) -> Iterator["Folder"]:
        """This folder and all below it."""
        yield self
        for inner in self.folders:
            yield from inner.tree()

    def all_images(self) -> Iterator[Path]:
        return (image for folder in self.tree() for image in folder.images)

    def filled(self) -> list["Folder"]:
        """Sub-folders that hold images, at any depth."""
        return [inner for inner in self.folders if any(inner.all_images())]


@dataclass(frozen=True)
class Names:
    """Which folder names mean good and bad; `good` and `bad` are names that the user adds."""

    good: str | None = None
    bad: tuple[str, ...] = ()

    def is_good(self, name: str) -> bool:
        return name == self.good or (_matches(_GOOD, name) and name not in self.bad)

    def is_bad(self, name: str) -> bool:
        return name in self.bad or (_matches(_BAD, name) and name != self.good)

    def known(self, name: str) -> bool:
        return self.is_good(name) or self.is_bad(name)

    def label(self, parts: Sequence[str]) -> str | None:
        """The word good, a type of defect, or None where the outermost folder's name says neither."""
        if not parts or not self.known(parts[0]):
            return None
        if self.is_good(parts[0]):
            return "good"
        within = "/".join(parts[1:])
        return within if within not in ("", "good") else "/".join(parts)


def walk(path: Path) -> Folder:
    """List a folder and all below it; links are followed unless they lead back up.

    Raises `DataError` where one of them cannot be opened.
    """
    real = path.resolve()
    return _walk(path, real, frozenset(real.parents))


def _walk(path: Path, real: Path, above: frozenset[Path]) -> Folder:
    above |= {real}
    folders, images, others = [], [], []
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}): check its permissions") from None
    for entry in entries:
        if is_set_aside(entry.name):
            others.append((entry, "is hidden, or of the system"))
        elif entry.is_dir():
            target = entry.resolve() if entry.is_symlink() else real / entry.name
            if target in above:
                others.append((entry, "is a link back to a folder above it"))
            else:
                folders.append(_walk(entry, target, above))
        elif not entry.is_file():
            others.append((entry, "is a broken link" if entry.is_symlink() else "is not a file"))
        elif is_photograph(entry):
            images.append(entry)
        else:
            others.append((entry, "is not an image"))
    return Folder(path, tuple(folders), tuple(images), tuple(others))


def is_mask_folder(folder: Folder) -> bool:
    """Whether its name says that it holds ground truth."""
    return _matches(_MASK_FOLDER, folder.name)


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(re.sub(r"[\s-]+", "_", name.casefold())) is not None
