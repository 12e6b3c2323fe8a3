"""kizu's defaults over categories: a row each, the mean, the machine; written to benchmarks/results/accuracy.csv.

python benchmarks/accuracy.py ../shared/data/mvtec_ad ../shared/data/magnetic_tile
python benchmarks/accuracy.py --quick            one rendered category, half a minute
python benchmarks/accuracy.py DATA… -- --backbone resnet18 --weights resnet18.pth     other settings
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from kizu.cli.terminal import print_results
from kizu.config import CONFIGS, build
from kizu.data import dataset, demo
from kizu.data.files import write_text
from kizu.detectors import detector_class
from kizu.evaluation.evaluate import evaluate
from kizu.evaluation.experiment import machine, versions
from kizu.evaluation.tables import results_csv

SHARED = Path(__file__).parents[2] / "shared" / "data"


def main() -> None:
    ours, _, settings = (" ".join(sys.argv[1:]) + " ").partition("-- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--method", default="patchcore", choices=CONFIGS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "accuracy.csv"))
    options = parser.parse_args(ours.split())
    words = settings.split()
    chosen = {
        key.removeprefix("--").replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)
    }
    config = build(CONFIGS[options.method], chosen)
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.data or ([demo.render(scratch)] if options.quick else present())
        results = []
        for folder in folders:
            data = dataset.find(Path(folder))
            for category in data.categories:
                start = time.perf_counter()
                detector = detector_class(options.method)(config)
                detector.fit(data.select(category, "train"), held_out=data.select(category, "validation"))
                results.append(evaluate(detector, data.select(category, "test"), category=category, root=data.root))
                print(f"{category}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print_results(results, None, {"as_json": False})
    print(f"\n{machine()['summary']}; " + ", ".join(f"{key} {value}" for key, value in versions().items()))
    if not options.quick:
        write_text(options.output, results_csv(results))


def present() -> list[Path]:
    folders = [SHARED / name for name in ("mvtec_ad", "magnetic_tile", "mvtec_loco/juice_bottle")]
    if not all(folder.is_dir() for folder in folders):
        sys.exit(f"There are no images at {SHARED}: name a data set, or use --quick")
    return folders


if __name__ == "__main__":
    main()
