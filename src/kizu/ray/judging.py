"""Verdicts on a Ray Data set of photographs: a pool of actors, each with the model in one thread.

No photograph passes through Ray's object store on the command line's way: an actor reads the files that its rows name,
a few ahead of the network, and gives back rows of plain values.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.data import files, image
from kizu.errors import BadImage, OptionError, require
from kizu.inference import model_folder, model_json, processor
from kizu.inference.batch import FileVerdict
from kizu.ray.addresses import is_remote, located

__all__ = ["Judge", "ModelFiles", "check_expression", "in_pool", "judge", "model_files", "num_cores"]

BATCH = 64  # photographs that an actor of a user's own pipeline gets together
Hashed = tuple[npt.NDArray[np.uint8], tuple[int, int]]


@dataclass(frozen=True)
class ModelFiles:
    """A model on its way to other machines: its files' contents, in Ray's object store."""

    contents: Any  # ray.ObjectRef of dict[str, npt.NDArray[np.uint8]]
    version: str
    exported: bool

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The files in a folder of this machine, for as long as it takes to load them."""
        with files.scratch_folder() as scratch:
            for name, content in require("ray").get(self.contents).items():
                content.tofile(Path(scratch) / name)
            yield Path(scratch)


@dataclass(eq=False)
class Fetched:
    """A photograph that is read whole and then decoded, so that what was judged can be told by its hash."""

    address: str
    content: bytes | None = None
    root: str = ""  # what relative paths start from: an actor is in a folder of its own
    content_hash: str | None = None

    @property
    def name(self) -> str:
        return self.address

    def read(self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False) -> Hashed:
        content = self._read() if self.content is None else self.content
        self.content_hash = hashlib.blake2b(content, digest_size=16).hexdigest()
        return image.read_at_least(content, at_least, white, large=large)

    def _read(self) -> bytes:
        try:
            if is_remote(self.address):
                system, name = located(self.address)
                with system.open_input_file(name) as file:
                    if file.size() > image.MAX_FILE_BYTES:
                        raise BadImage(self.address, f"has more than {image.MAX_FILE_BYTES / 1e6:.0f} MB")
                    return bytes(file.read())
            path = Path(self.root, self.address)
            files.check_regular(path, image.MAX_FILE_BYTES)
            return path.read_bytes()
        except FileNotFoundError:
            raise BadImage(self.address, "does not exist (was it moved or deleted meanwhile?)") from None
        except (OSError, OptionError) as error:
            if not is_remote(self.address):
                image.size_of(Path(self.root, self.address))  # raises the sentence that the file deserves
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise BadImage(self.address, f"cannot be read ({reason})") from None


class Judge:
    """An actor's model, and what it says of tables of photographs."""

    def __init__(self, model: ModelFiles, root: str, part: str | None) -> None:
        processor.use(1)
        image.give_back_large()
        with model.folder() as folder:
            self.model = model_folder.load(folder)
        self.model.workers = 1
        self.version, self.root = model.version, root
        self.part = re.compile(part) if part else None

    def __call__(self, table: Any) -> Any:
        """An Arrow table with a column path, and perhaps bytes → the same without bytes, and with verdicts."""
        pa = require("pyarrow")
        names = table.column_names
        photographs = [
            Fetched(address or "", content, self.root)
            for address, content in zip(
                table["path"].to_pylist() if "path" in names else [""] * len(table),
                table["bytes"].to_pylist() if "bytes" in names else [None] * len(table),
                strict=True,
            )
        ]
        judged = pa.Table.from_pylist(list(self._rows(photographs)), _schema(pa))
        for name in names:
            if name != "bytes" and name not in judged.column_names:
                judged = judged.append_column(table.schema.field(name), table[name])
        return judged

    def _rows(self, photographs: list[Fetched]) -> Iterator[dict[str, Any]]:
        last = time.perf_counter()
        for photograph, outcome in self.model.judge(photographs):
            now = time.perf_counter()
            yield self._row(photograph, FileVerdict.of(photograph.address, outcome, self.model, seconds=now - last))
            last = now

    def _row(self, photograph: Fetched, verdict: FileVerdict) -> dict[str, Any]:
        values = verdict.model_dump()
        return {
            **{
                name: values[name]
                for name in ("verdict", "score", "p_value", "threshold", "zone", "regions", "seconds")
            },
            "cannot_judge": verdict.cannot_judge or None,
            "error": verdict.error or None,
            "path": photograph.address,
            "content_hash": photograph.content_hash,
            "part": self._part(photograph.address),
            "model": self.version,
        }

    def _part(self, address: str) -> str:
        """What tells the part: what the expression finds in the address, or the file's name without its ending."""
        found = self.part.search(address) if self.part else None
        name = found[found.re.groups and 1] if found else None
        return name or PurePosixPath(address).stem


def judge(
    dataset: Any,
    model: "str | os.PathLike[str]",
    *,
    actors: int | None = None,
    batch_size: int | None = BATCH,
    part: str | None = None,
) -> Any:
    """A Ray Data set with the verdict of a model on each of its photographs, as a lazy `map_batches`.

    `dataset` has a column path, of paths or addresses that the workers read, or bytes, of encoded photographs, as
    `ray.data.read_binary_files` gives them; bytes are dropped, all other columns kept. New columns: verdict (pass,
    stop, ask or error), score, p_value, threshold, zone, regions, cannot_judge, error, content_hash, part, model,
    seconds. A photograph that cannot be read is a row that says why.

    `model` is a model's folder on this machine; its files travel to the workers. Each of the `actors` has a core and
    judges in one thread; by default there are as many as the cluster has cores, also as it grows. A trained model takes
    a GPU for each where the cluster has some. `part` is a regular expression that finds a part's name in a path.
    """
    if part is not None:
        check_expression(part)
    shipped = model_files(model)
    return in_pool(dataset, Judge, (shipped, os.getcwd(), part), shipped, actors, batch_size, alone=False)  # noqa: PTH109


def in_pool(
    dataset: Any,
    kind: type[Any],
    arguments: tuple[Any, ...],
    model: ModelFiles,
    actors: int | None,
    batch_size: int | None,
    *,
    alone: bool,
) -> Any:
    """What actors `kind(*arguments)` make of the batches of a Ray Data set; each has a core, or a GPU too.

    Ray starts an actor that dies again, and has it repeat what it was at. Where the data set is not `alone` made of
    what is there already, it begins with one actor: as many as there are cores would leave none for reading.
    """
    gpus = 0 if model.exported else int(require("ray").cluster_resources().get("GPU", 0))
    size = actors or gpus or num_cores()
    return dataset.map_batches(
        kind,
        fn_constructor_args=arguments,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=require("ray.data").ActorPoolStrategy(min_size=1, initial_size=size if alone else 1, max_size=size),
        num_cpus=1,
        num_gpus=1 if gpus else None,
    )


def num_cores() -> int:
    """The cores of the cluster."""
    return max(1, int(require("ray").cluster_resources().get("CPU", 1)))


def model_files(folder: "str | os.PathLike[str]") -> ModelFiles:
    """A model's files, put into Ray's object store. Raises `ModelError` for a folder that is none, or is damaged."""
    found = model_folder.model_folder(folder)
    model_json.check(found)
    version, about = model_folder.version(found), model_folder.description(found)
    contents = {path.name: np.fromfile(path, np.uint8) for path in sorted(found.iterdir()) if path.is_file()}
    return ModelFiles(require("ray").put(contents), version, "export" in about)


def check_expression(part: str) -> None:
    """Raise `OptionError` for what is no regular expression."""
    try:
        re.compile(part)
    except re.error as error:
        raise OptionError(f"`part={part}` is no regular expression ({error})") from None


def _schema(pa: Any) -> Any:
    corner = pa.list_(pa.int32())
    region = [("box", corner), ("area", pa.int64()), ("peak", pa.float64()), ("place", corner)]
    region += [("p_value", pa.float64()), ("contour", pa.list_(corner)), ("zone", pa.string())]
    size = [*((name, pa.float64()) for name in ("area", "length", "width", "direction")), ("unit", pa.string())]
    region += [("size", pa.struct(size)), ("matters", pa.bool_())]
    return pa.schema(
        [
            ("path", pa.large_string()),
            ("content_hash", pa.string()),
            ("part", pa.string()),
            ("score", pa.float64()),
            ("p_value", pa.float64()),
            ("verdict", pa.string()),
            ("threshold", pa.float64()),
            ("zone", pa.string()),
            ("regions", pa.list_(pa.struct(region))),
            ("cannot_judge", pa.string()),
            ("model", pa.string()),
            ("seconds", pa.float64()),
            ("error", pa.string()),
        ]
    )
