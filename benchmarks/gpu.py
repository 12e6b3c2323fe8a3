"""What kizu does on a GPU, in one command of nine minutes, also on a machine that reaches no package index.

python benchmarks/gpu.py pack gpu-kit                 where the data are: what the other machine needs, in a folder
python benchmarks/gpu.py                              on the machine with the GPU
python benchmarks/gpu.py --device cpu --seconds 60    a rehearsal: every part in its smallest form

Seven parts, each in a process of its own and with a share of the time: machine, tests (of tests/test_cuda.py, and then
more of the suite), patchcore, efficientad, simplenet, teacher (a distillation of networks S and M, as long as its share
lasts), training (EfficientAD and PUAD with that teacher). What a part does not need of its time, the next ones have. A
part that fails or is not done when its share is over is a row that says so. Every row is written to OUTPUT/gpu.csv, of
a rehearsal OUTPUT/gpu-rehearsal.csv, as soon as it is known: a run that is ended loses only what is being measured.
Teachers are written to OUTPUT/gpu-teachers.

A variant's column "off" says how far its results are from those in strict single precision: of maps the largest
difference in units of the largest value, of searches the share of other neighbours, of coresets the cover radius.

The machine needs Python, torch, torchvision, timm, onnxruntime, safetensors, scikit-learn, scipy, click, jinja2, NumPy
and Pillow; what else is missing is taken from the wheels of the pack.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

START = time.monotonic()
HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT / "src"), str(HERE)]

from on_gpu import pack  # noqa: E402  (needs nothing but Python)

SHARES = {  # of the time, on a GPU and on a CPU
    "machine": (1, 1),
    "tests": (8, 16),
    "patchcore": (20, 30),
    "efficientad": (15, 14),
    "simplenet": (8, 14),
    "teacher": (31, 12),
    "training": (20, 14),
}
AIM = 0.93  # of its share, that a part plans with: then it ends by itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--seconds", type=float, default=520, help="of the whole; a rehearsal's are counted once all is imported"
    )
    parser.add_argument("--pack", type=Path, default=ROOT / "gpu-kit", help="folder that `gpu.py pack` wrote")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", action="append", choices=SHARES, help="Repeatable. Default: all parts.")
    commands = parser.add_subparsers(dest="command", metavar="")
    add_pack_options(commands.add_parser("pack", help="make the folder for a machine with a GPU"))
    options = parser.parse_args()
    if options.command == "pack":
        pack.make(options)
        return
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several need an idle machine
    with pack.missing_packages(options.pack):
        load()
        run(options)


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "gpu-kit")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with mvtec_ad, mvtec_loco, natural")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights", help="folder with a ResNet-18")
    parser.add_argument("--python-version", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--limit", type=float, default=52, help="MiB, which the pictures of other things fill up")
    parser.add_argument("--pictures", type=int, default=10_000, help="of other things, at most")
    parser.add_argument("--wheels", action=argparse.BooleanOptionalAction, default=True)


def load() -> None:
    """Import all that the parts need, once: they are forks of this process, which itself never touches the GPU."""
    import torchvision  # noqa: F401

    import on_gpu.parts  # noqa: F401


def run(options: argparse.Namespace) -> None:
    from on_gpu.measure import Job, Row, write
    from on_gpu.parts import PARTS

    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / ("gpu.csv" if options.device == "cuda" else "gpu-rehearsal.csv")
    end = (START if options.device == "cuda" else time.monotonic()) + options.seconds
    names = [name for name in SHARES if not options.only or name in options.only]
    column = 0 if options.device == "cuda" else 1
    rows: list[Row] = [Row("machine", "loading", value=f"{time.monotonic() - START:.1f}", unit="s")]
    for position, name in enumerate(names):
        weights = [SHARES[later][column] for later in names[position:]]
        share = max(0.0, end - time.monotonic()) * weights[0] / sum(weights)
        print(f"\n{name}: up to {share:.0f} s", flush=True)
        start = time.monotonic()
        job = Job(name, options.device, options.pack, options.output, start + AIM * share)

        def heard(row: Row) -> None:
            rows.append(row)
            write(target, rows)
            print("  " + "  ".join(filter(None, row.values()[1:])), flush=True)

        problem = apart(PARTS[name], job, start + share, heard)
        if problem:
            heard(Row(name, "part", remark=problem))
        heard(Row(name, "seconds", value=f"{time.monotonic() - start:.1f}", unit="s", remark=f"of {share:.0f}"))
    tables(rows)
    print(f"\n{target}: {len(rows)} rows, {time.monotonic() - START:.0f} s, {rows[0].value} of them loading")


def apart(part: Callable[..., None], job: object, end: float, heard: Callable[..., None]) -> str:
    """Run a part in a fork until `end`, hearing its rows; returns what went wrong, if anything did.

    A fault of the GPU ends the part's process and no other one.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=alone, args=(part, job, theirs, ours))
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(max(0.0, end - time.monotonic())):
                return "stopped: its share of the time was over"
            heard(ours.recv())
    except EOFError:
        process.join(max(1.0, end - time.monotonic()))
        return "" if process.exitcode == 0 else f"its process ended with {process.exitcode}"
    finally:
        kill_group(process.pid)
        process.kill()
        process.join()


def kill_group(number: int | None) -> None:
    """End a part's process with all that it started."""
    with suppress(ProcessLookupError):
        if number:
            os.killpg(number, signal.SIGKILL)


def alone(part: Callable[..., None], job: object, send: Connection, other_end: Connection) -> None:
    """What the fork does: the part, and a row with the error that ended it."""
    from on_gpu.measure import Job, first_line

    assert isinstance(job, Job)
    os.setsid()
    other_end.close()
    job.send = send.send
    try:
        part(job)
    except BaseException as error:
        job.row("part", remark=first_line(error))
        raise
    finally:
        send.close()


def tables(rows: list) -> None:  # type: ignore[type-arg]
    from kizu.cli.terminal import print_table

    for name in dict.fromkeys(row.part for row in rows):
        print(f"\n{name}\n")
        print_table([dict(zip(row.columns()[1:], row.values()[1:], strict=True)) for row in rows if row.part == name])


if __name__ == "__main__":
    main()
