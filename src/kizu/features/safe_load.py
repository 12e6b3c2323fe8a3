"""What other programs left behind as pickles, read without running anything in them.

A pickle is a program: it names functions and calls them. `read_tensors` reads the tensors of files that torch.save
wrote, whole modules included; `read_plain` reads numbers, words and collections of them.

A checkpoint is a zip archive of one pickle and one file of numbers a storage. The pickle is read with a table of what
it may name: containers, storage types and the functions that put a tensor together, all replaced by ones of our own.
Whatever else it names becomes an inert `_Part`, which remembers what it was given and does nothing; and a file that
names a function of Python's own library has no good reason to, and is refused.
"""

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from kizu.data import files
from kizu.errors import ModelError

__all__ = ["read_plain", "read_tensors", "refuse_not_finite", "write_plain"]

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
HARMLESS = {"builtins.set", "builtins.object", "copyreg._reconstructor", "_codecs.encode", "functools.partial"}
MAX_DEPTH = 50  # modules inside modules
MAX_PLAIN_BYTES = 10_000_000
PLAIN = (type(None), bool, int, float, str, bytes)


class _Part:
    """Stands for an object of any class; takes whatever it is made with, keeps the state it is given."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "_Part":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and tensors; whatever it calls is code of this file."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module.split(".")[0] in sys.stdlib_module_names and f"{module}.{name}" not in HARMLESS:
            raise ValueError(f"it would call {module}.{name}")
        return _Part

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", type, key, device, count) → the numbers, one-dimensional."""
        _, dtype, key, _, count = pid
        entry = self.archive.getinfo(f"{self.root}data/{key}")
        size = int(count) * dtype.itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
            raise ValueError(f"storage {key} is not {size} plain bytes")
        return torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype) if count else torch.empty(0)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()  # which refuses to reach beyond the storage


def read_tensors(source: Path | IO[bytes], name: str | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, those of a whole module named as in its state_dict, a lone one "".

    Raises `ModelError` for a file that torch.save did not write (since 2020), that is damaged, or holds no tensors.
    """
    name = name or str(source)
    try:
        with zipfile.ZipFile(source) as archive:
            pickles = [entry for entry in archive.namelist() if entry.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise ValueError("no archive of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("numbers in another byte order")
            if archive.getinfo(pickles[0]).compress_type != zipfile.ZIP_STORED:
                raise ValueError("a packed pickle")
            content = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), archive, root).load()
        tensors = dict(_named(content, "", 0))
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a broken or hostile pickle raises anything
        raise ModelError(f"{name}: holds no tensors that can be read ({type(error).__name__}: {error})") from None
    if not tensors:
        raise ModelError(f"{name}: holds no tensors")
    return tensors


def _named(content: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dictionaries, and in modules: parameters, buffers, then what is inside, as state_dict orders them."""
    if depth > MAX_DEPTH:
        raise ValueError("modules too deep inside each other")
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, _Part) and isinstance(content.state, dict):
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _named(content.state.get(kind), prefix, depth + 1)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _named(value, f"{prefix}{key}.", depth + 1)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, words and collections of them. Whatever would be imported or called stops it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_plain(path: str | os.PathLike[str]) -> Any:
    """The plain values in a pickle. Nothing is imported or called. Raises `ModelError` for any other pickle."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_PLAIN_BYTES:
            raise ModelError(f"{path} has more than {MAX_PLAIN_BYTES:,} bytes: no file of plain values")
        with path.open("rb") as file:
            value = _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except ModelError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise ModelError(f"{path} is refused: it should hold plain values only, but {error}") from None
    return value


def write_plain(path: str | os.PathLike[str], value: Any) -> None:
    """Pickle plain values, whole or not at all. Raises `TypeError` for any other."""
    _check(value)
    with files.new_file(path) as temporary:
        temporary.write_bytes(pickle.dumps(value, protocol=4))


def _check(value: Any) -> None:
    if isinstance(value, dict):
        _check([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part)
    elif type(value) not in PLAIN:
        raise TypeError(f"{type(value).__name__} is no plain value")


def refuse_not_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise `ModelError` where a tensor holds a value that is no finite number; a single value may be infinite."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (
            tensor.isfinite().all() if tensor.numel() > 1 else ~tensor.isnan().any()
        ):
            raise ModelError(f"{name}: the model is damaged ({key} holds values that are no finite numbers)")
