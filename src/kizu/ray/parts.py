"""A folder of Parquet files with a row a photograph: written part by part, each whole or not at all, and gone on with.

The rows are their own record of what is done: whatever path stands in a part is judged. A part's name follows from the
paths in it, so that one that is written twice is there once.
"""

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any, get_args

from kizu.data import files
from kizu.errors import DataError, OptionError, OutputError, require
from kizu.inference.verdict import Verdict
from kizu.ray.addresses import is_remote, located

__all__ = ["VERDICTS", "begin", "judged", "write_part"]

VERDICTS = get_args(Verdict.model_fields["verdict"].annotation)
ABOUT = "_kizu.json"  # readers of Parquet folders skip names that begin with _
BUCKETS = ("s3://", "gs://", "gcs://", "abfs://", "abfss://")
FOREIGN = "holds tables that are not verdicts of kizu: choose another folder with `parquet`"


def begin(folder: str, version: str) -> str:
    """Claim a folder for the verdicts of one version of a model, and return the claim: the last one holds.

    Raises `OptionError` where the folder holds something else, and `OutputError` where it cannot be written to.
    """
    fs = require("pyarrow.fs")
    system, path = located(folder)
    try:
        system.create_dir(path, recursive=True)
        about = _about(folder)
        if about is None and any(item.extension == "parquet" for item in system.get_file_info(fs.FileSelector(path))):
            raise OptionError(f"{folder} {FOREIGN}")
        if about is not None and about.get("model") != version:
            raise OptionError(
                f"{folder} holds verdicts of another model, or of this one before it was changed (version "
                f"{about.get('model')}, not {version}): choose another folder with `parquet`"
            )
        claim = secrets.token_hex(8)
        _write(folder, ABOUT, files.json_text({"model": version, "claim": claim}).encode())
    except OSError as error:
        raise OutputError(folder, str(error).partition("\n")[0]) from None
    return claim


def judged(folder: str) -> Any:
    """An Arrow table of the paths and the verdicts that a folder holds. Raises `DataError` where a part is damaged."""
    pa, fs = require("pyarrow"), require("pyarrow.fs")
    parquet = require("pyarrow.parquet")
    system, path = located(folder)
    parts = [item.path for item in system.get_file_info(fs.FileSelector(path)) if item.extension == "parquet"]
    tables = [pa.schema([("path", pa.large_string()), ("verdict", pa.string())]).empty_table()]
    for part in sorted(parts):
        try:
            tables.append(
                parquet.read_table(part, columns=["path", "verdict"], filesystem=system).cast(tables[0].schema)
            )
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{part} is damaged ({reason}): remove it, and its photographs are judged again") from None
    return pa.concat_tables(tables)


def write_part(table: Any, folder: str, claim: str) -> dict[str, Any]:
    """Write verdicts, if the claim on the folder still holds, and say how many there are of each kind.

    Runs on any machine of a cluster. What goes wrong is returned as `problem`, in a sentence.
    """
    parquet, pa = require("pyarrow.parquet"), require("pyarrow")
    counts = dict.fromkeys(VERDICTS, 0)
    for verdict in table["verdict"].to_pylist():
        counts[verdict] += 1
    digest = hashlib.blake2b("\0".join(table["path"].to_pylist()).encode(), digest_size=12).hexdigest()
    stream = pa.BufferOutputStream()
    parquet.write_table(table, stream, compression="zstd")
    content = stream.getvalue()
    problem = ""
    try:
        about = _about(folder)
        if about is None or about.get("claim") != claim:
            problem = f"{folder}: another command has begun to write to this folder, and this one gives way"
        else:
            _write(folder, f"part-{digest}.parquet", content.to_pybytes())
    except (OSError, OutputError) as error:
        problem = str(error)
    return {**counts, "bytes": content.size, "problem": problem}


def _about(folder: str) -> dict[str, Any] | None:
    system, path = located(f"{folder.rstrip('/')}/{ABOUT}")
    try:
        with system.open_input_stream(path) as stream:
            about = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except ValueError:
        raise OptionError(f"{folder} {FOREIGN}") from None
    return about if isinstance(about, dict) else {}


def _write(folder: str, name: str, content: bytes) -> None:
    """A file that appears whole: in a bucket because an upload does, elsewhere by its new name."""
    if not is_remote(folder):
        with files.new_file(Path(folder) / name) as temporary:
            temporary.write_bytes(content)
        return
    system, path = located(f"{folder.rstrip('/')}/{name}")
    target = path if folder.startswith(BUCKETS) else f"{path}{files.UNFINISHED}{secrets.token_hex(4)}"
    with system.open_output_stream(target) as stream:
        stream.write(content)
    if target != path:
        system.move(target, path)
