"""Python in a process of its own, forked from one that has imported the large packages of others already.

Importing torch, timm and their kind takes four seconds, a command of the tests one. What is kizu's is imported anew in
every process, so that nothing is hidden that a user would meet.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

LARGE = ["click", "jinja2", "numpy", "onnxruntime", "PIL.Image", "pydantic", "rich.progress", "safetensors.numpy"]
LARGE += ["scipy.ndimage", "sklearn.metrics", "timm", "torch.utils.tensorboard", "torchvision"]

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(LARGE)


def python(*words, cwd=None, env=None, timeout=300):
    """What `python -m module …` or `python -c code` returned and wrote."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        process = forkserver.Process(
            target=_execute, args=([*map(str, words)], str(cwd or Path.cwd()), environment, [*map(str, files)])
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout, stderr = (file.read_text(errors="surrogateescape") for file in files)
        code = process.exitcode
        process.close()
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def kizu(*arguments, code=0, cwd=None, env=None):
    """A command that ends as it should, and not with a traceback."""
    done = python("-m", "kizu", *arguments, cwd=cwd, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def _execute(words, cwd, environment, files):
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)
