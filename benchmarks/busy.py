"""How long a verdict takes beside other programs that compute.

python benchmarks/busy.py FOLDER_OF_A_CATEGORY        as in mvtec_ad/bottle, with train/good and test/good

N programs turn in circles while photographs are judged, one at a time and as a folder, by a trained and by an exported
model, and while one is trained. Times are also given as multiples of those beside no other program.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kizu
from kizu.cli.terminal import print_table
from kizu.data import files
from kizu.evaluation.experiment import machine
from kizu.export.onnx import export

HERE = Path(__file__).parent
MEASURE = """
import json, sys, time
from pathlib import Path
import kizu
from kizu.inference.batch import predict_files
what, model, folder, count = *sys.argv[1:4], int(sys.argv[4])
paths = sorted(Path(folder).iterdir())
paths = [paths[n % len(paths)] for n in range(count)]
spent = []
def timed(work):
    start = time.perf_counter()
    work()
    spent.append(1000 * (time.perf_counter() - start))
if what == "fit":
    timed(lambda: kizu.PatchCore(coreset=0.01).fit(Path(model)))
else:
    inspector = kizu.load(model)
    for path in paths[:3]:
        inspector.predict(path)
    if what == "folder":
        timed(lambda: list(inspector.judge([kizu.Photo(path) for path in paths])))
        spent = [spent[0] / len(paths)]
    else:
        for path in paths:
            timed(lambda: inspector.predict(path))
print(json.dumps(spent))
"""


def main() -> None:
    options = parsed()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        good = options.folder / "train" / "good"
        trained = kizu.PatchCore().fit(good)
        models = {"trained": trained.save(Path(scratch, "trained"))}
        models["exported"] = export(trained, Path(scratch, "exported")).folder
        jobs = [(what, name, models[name]) for name in models for what in ("photograph", "folder")]
        for what, name, model in [*jobs, ("fit", "trained", good)]:
            idle = 0.0
            for busy in options.beside:
                spent = measured(what, model, options.folder / "test" / "good", options.photographs, busy)
                middle = statistics.median(spent)
                idle = idle or middle
                row = {"what": what, "model": name, "beside": busy, "ms": f"{middle:.1f}"}
                rows.append(
                    {**row, "times idle": f"{middle / idle:.2f}", "worst / median": f"{max(spent) / middle:.2f}"}
                )
                print(rows[-1], file=sys.stderr)
    print_table(rows)
    print(f"\n{machine()['summary']}")
    files.write_csv(HERE / "results" / "busy.csv", rows[0], [row.values() for row in rows])


def measured(what: str, model: Path, folder: Path, count: int, busy: int) -> list[float]:
    """Milliseconds of each photograph, a photograph of the folder, or the fit."""
    with working(busy):
        words = [sys.executable, "-c", MEASURE, what, str(model), str(folder), str(count)]
        spent: list[float] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return spent


@contextmanager
def working(count: int) -> Iterator[None]:
    """So many programs that compute and do nothing else."""
    programs = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=int, default=50)
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 2, 4, 8])
    return parser.parse_args()


if __name__ == "__main__":
    main()
