"""A small model, and real `kizu serve` processes around it."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image

import kizu
from test_detectors import part

KIZU = Path(sys.executable).with_name("kizu")


def small_model(folder, first=0, size=64):
    """A PatchCore with thumbnails, fitted on twelve parts."""
    good = [part(first + seed) for seed in range(12)]
    return kizu.PatchCore(size=size, coreset=0.2, thumbnails=True).fit(good).save(folder)


def encoded(picture, format="PNG"):
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, format)
    return buffer.getvalue()


@contextmanager
def serving(*arguments, log, before="", files=None, env=None):
    """A server at any free port: the process and its address. It is killed at the end if it still runs.

    Its Python does first what `before` says, and may open so many `files`; `env` is added to the environment.
    """
    command = [sys.executable, "-c", f"{before}\nfrom kizu.cli.main import main; main()"]
    command += ["serve", *map(str, arguments), "--port", "0"]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=log.parent,
            preexec_fn=limit,
            env=os.environ | (env or {}),
        )
    try:
        line = process.stdout.readline()
        assert " at http://" in line, line + log.read_text()
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
