"""Where photographs and tables lie: on a disk, or in a bucket that pyarrow.fs reads."""

import posixpath
from functools import cache
from pathlib import Path
from typing import Any

from kizu.errors import OptionError, require

__all__ = ["is_remote", "located"]


def is_remote(address: str) -> bool:
    """Whether this is an address, as s3://bucket/folder, and no path."""
    return "://" in address


def located(address: str) -> tuple[Any, str]:
    """The pyarrow file system that has an address or a path, and the name that it has there.

    What follows the bucket is taken as it stands, also where it holds ? or %. Raises `OptionError` where no file system
    has such an address.
    """
    if not is_remote(address):
        return require("pyarrow.fs").LocalFileSystem(), str(Path(address).absolute())
    scheme, _, rest = address.partition("://")
    bucket, _, name = rest.partition("/")
    system, root = _system(scheme, bucket)
    return system, posixpath.join(root, name) if name else root


@cache
def _system(scheme: str, bucket: str) -> tuple[Any, str]:
    """A file system is opened once a process: each is a pool of connections."""
    try:
        system, root = require("pyarrow.fs").FileSystem.from_uri(f"{scheme}://{bucket}/")
    except (ValueError, OSError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"{scheme}://{bucket}: pyarrow has no file system for this address ({reason})") from None
    return system, root
