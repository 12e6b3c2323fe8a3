"""How many good parts a level really stops, over random splits of the good images, beside other ways to set one.

python benchmarks/false_alarms.py                                     PatchCore, every category, 200 splits
python benchmarks/false_alarms.py --size 320                          with its default input size, slowly
python benchmarks/false_alarms.py --method simplenet --fits 8         200 splits over 8 trainings
python benchmarks/false_alarms.py DATA… --seconds 40                  a while for each; the same command goes on
python benchmarks/false_alarms.py --learn 12 --copies 5               five photographs of each part, as `fit` takes them
python benchmarks/false_alarms.py --learn 40 --quarters               four photographs of each part, in splits by part
python benchmarks/false_alarms.py --zones                             three zones inspected, each on its own, and one ig
python benchmarks/false_alarms.py --sizes                             regions of 40 pixels and 8 in length stop a part
python benchmarks/false_alarms.py --learn 60 --tiles                  photographs that are judged in tiles, four of each
python benchmarks/false_alarms.py DATA… --shards 4                    PatchCore from four shards of the photographs
python benchmarks/false_alarms.py --quick                             a rendered category, a few splits

All good images of a category, training and test, are one pool. A split learns from some of them and judges the rest,
and the defects. What a backbone makes of an image is computed once and remembered. With fewer fits than splits, the
images judged are split again and again into those that set the level and those that are counted.

With copies, each photograph to learn from is there several times, saved again as JPEG: a row for `fit` as it is, which
learns from one of them, and a row for `keep_copies=True`.

With quarters, each photograph is cut into four, which are four photographs of one part: a row for `fit` as it counts
parts (`group_by`), where a part is stopped if any of its photographs is, and one where each photograph is alone.

With shards, each training is that of a cluster: of so many shards of the photographs, in one process here, and with so
little memory that the bank is chosen among coresets of the shards. With enough it would be that of one machine.

With tiles, each photograph is larger than the network's input, and judged in four tiles that overlap by a fifth.

Rules: `kizu` is what `fit` promises, of the score and of any marked pixel; `quantile` the 1 − α quantile of the scores
of the training images themselves; `drift` the share of sequences of good parts that raise an alarm, and of those that
end in defects; `F1-max` the threshold with the best F1 on labelled images, one half of those judged, applied to the
other half (anomalib's default rule, which knows no α); `largest` the highest score of that half's good images (the same
rule without defects).
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import kizu
from accuracy import present
from kizu.calibration.drift import DriftTest
from kizu.calibration.threshold import calibrate
from kizu.cli.terminal import print_table
from kizu.config import CONFIGS, build
from kizu.data import dataset, demo, image
from kizu.data.files import write_csv
from kizu.data.preprocessing import Preprocessing, batches
from kizu.detectors import detector_class
from kizu.detectors.base import Detector
from kizu.detectors.patchcore.sharded import ShardedPatchCore
from kizu.evaluation.experiment import machine
from kizu.features import backbone

RESULTS = Path(__file__).parent / "results"
RATES = (0.1, 0.05, 0.02)
ZONES = kizu.read_zones(
    [
        "left=0%,0% 33%,0% 33%,100% 0%,100%",
        "middle=33%,0% 67%,0% 67%,100% 33%,100%",
        "right=67%,0% 100%,0% 100%,100% 67%,100%",
    ],
    ["foot=0%,85% 100%,85% 100%,100% 0%,100%"],
)
SIZES = {"min_area": 40, "min_length": 8}  # of photographs as the network sees them
Scores = npt.NDArray[np.float64]


class Remembering(nn.Module):
    """A backbone that looks at each image once."""

    maps: dict[bytes, list[Tensor]] = {}  # noqa: RUF012 - shared by all splits on purpose

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.layers = network, network.layers

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = self(images)
        return maps, {name: layer.mean((2, 3)) for name, layer in zip(self.layers, maps, strict=True)}

    def forward(self, images: Tensor) -> list[Tensor]:
        keys = [hashlib.blake2b(image.numpy(force=True).tobytes()).digest() for image in images]
        unknown = [number for number, key in enumerate(keys) if key not in self.maps]
        if unknown:
            found = self.network(images[unknown])
            for position, number in enumerate(unknown):
                self.maps[keys[number]] = [layer[position].contiguous() for layer in found]
        return [torch.stack(layers) for layers in zip(*(self.maps[key] for key in keys), strict=True)]


def main() -> None:
    ours, _, settings = (" ".join(sys.argv[1:]) + " ").partition("-- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--method", default="patchcore", choices=CONFIGS)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--fits", type=int, help="as many trainings. Default: one a split")
    parser.add_argument("--learn", type=int, default=100, metavar="N", help="good images that each split learns from")
    parser.add_argument("--copies", type=int, default=1, help="of each photograph that is learned from")
    parser.add_argument("--quarters", action="store_true", help="cut each photograph into four of one part")
    parser.add_argument(
        "--zones", action="store_true", help="of the frame: left, middle and right; the foot is ignored"
    )
    parser.add_argument("--sizes", action="store_true", help="smaller regions than those of SIZES do not matter")
    parser.add_argument("--tiles", action="store_true", help="judge each photograph in four tiles")
    parser.add_argument("--shards", type=int, help="learn PatchCore from so many shards, as a cluster does")
    parser.add_argument("--size", type=int, default=160, help="of the photographs as the network sees them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each category; the next call goes on")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(ours.split())
    words = settings.split()
    chosen = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    chosen["size"] = str(options.size)
    if options.quick:
        options.splits, options.learn = 3, 60
    create = backbone.create
    backbone.create = lambda *arguments: Remembering(create(*arguments))  # type: ignore[assignment, arg-type]
    start = time.perf_counter()
    name = f"false_alarms_{options.method}" + (f"_copies_{options.copies}" if options.copies > 1 else "")
    name += ("_quarters" if options.quarters else "") + ("_zones" if options.zones else "")
    name += "_sizes" if options.sizes else ""
    name += "_tiles" if options.tiles else ""
    name += "_shards" if options.shards else ""
    kept = RESULTS / f".{name}_{options.size}.jsonl"  # every score of every training, to go on from
    resumable = not (options.quick or settings)
    before = kept.read_text().splitlines() if kept.exists() and resumable else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in before if line.endswith("}")]
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.data or ([demo.render(scratch)] if options.quick else present())
        for folder in folders:
            data = dataset.find(Path(folder))
            cases = [""]
            if options.quarters:
                cases = [", by part", ", each alone"]
            elif options.copies > 1:
                cases = [f" × {options.copies}", f" × {options.copies}, kept"]
            for category, kind in itertools.product(data.categories, cases):
                case = category + kind
                done = {row["fit"] for row in rows if row["category"] == case}
                began = time.perf_counter()
                for row in fits(data, category, chosen, options, done, kind):
                    rows.append({"category": case, "size": options.size, **row})
                    if resumable:
                        with kept.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
                    if time.perf_counter() - began > options.seconds:
                        break
    table = summarised(rows, options.splits, options.fits or options.splits)
    print_table(table)
    print(f"\n{machine()['summary']}; {time.perf_counter() - start:.0f} s")
    if not options.quick:
        write_csv(RESULTS / f"{name}.csv", table[0], map(dict.values, table))


def fits(
    data: dataset.Dataset,
    category: str,
    settings: dict[str, Any],
    options: argparse.Namespace,
    done: set[int],
    kind: str,
) -> Iterator[dict[str, Any]]:
    """What each training says: the scores behind its level, of its own images, of the other good ones, of defects."""
    rules = {**({"zones": ZONES} if options.zones else {}), **(SIZES if options.sizes else {})}
    tiles = {"tile": options.size, "overlap": options.size // 5} if options.tiles else {}
    config = build(CONFIGS[options.method], settings | rules | tiles)
    samples = data.select(category)
    parts = 4 if options.quarters else 1  # photographs of each part
    good, bad = (
        pixels([sample for sample in samples if sample.is_anomalous is defective], config, options.quarters)
        for defective in (False, True)
    )
    Remembering.maps.clear()
    for fit in range(options.fits or options.splits):
        if fit in done:
            continue
        order = np.random.default_rng(fit).permutation(len(good) // parts)
        numbers = (order[:, None] * parts + np.arange(parts)).ravel()
        learned, others = numbers[: options.learn * parts], numbers[options.learn * parts :]
        detector = detector_class(options.method)(config)
        if options.shards:
            detector = Crowded(config, options.shards)
        photos = [photo.transpose(1, 2, 0) for photo in good[learned]]
        detector.fit(
            [*photos, *saved_again(photos, options.copies - 1)],
            keep_copies="kept" in kind or options.quarters,
            group_by=(learned // parts).tolist() if "by part" in kind else "none",
        )
        each = parts if "by part" in kind else 1
        good_scores, good_peaks = judged(detector, good[others], each)
        bad_scores, bad_peaks = judged(detector, bad, each)
        found = {
            "level_from": detector.calibration_scores,
            "map_level_from": detector.map_peaks,
            "learned": judged(detector, good[learned])[0],
            "good": good_scores,
            "good_peaks": good_peaks,
            "bad": bad_scores,
            "bad_peaks": bad_peaks,
        }
        yield {"fit": fit, **{key: [float(f"{value:.6g}") for value in values] for key, values in found.items()}}


def saved_again(photos: Sequence[npt.NDArray[np.uint8]], times: int) -> list[npt.NDArray[np.uint8]]:
    """Further copies of photographs, each saved as JPEG with another quality."""
    return [image.read(image.encode(photo, "JPEG", quality=95 - 8 * time)) for time in range(times) for photo in photos]


def pixels(samples: Sequence[Any], config: Any, quarters: bool = False) -> npt.NDArray[np.uint8]:
    """(N, 3, h, w) as the network sees them, or sees four tiles of; or each cut into four, which follow one another."""
    height, width = config.size
    scaling = Preprocessing((2 * height, 2 * width)) if quarters else Preprocessing(config.size, config.resize)
    if config.tile is not None:
        scaling = Preprocessing((2 * height - config.overlap, 2 * width - config.overlap))
    whole = np.concatenate([batch.pixels for batch in batches(samples, scaling)])
    if not quarters:
        return whole
    cut = whole.reshape(len(whole), 3, 2, height, 2, width).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cut.reshape(-1, 3, height, width))


class Crowded(ShardedPatchCore):
    """As if the features of all photographs were more than one machine can hold, and those of a shard were not."""

    def _memory_bytes(self, memory: str | int | None) -> int:
        self.memory_bytes = 3 * 10**7
        return self.memory_bytes


def judged(detector: Detector, photos: npt.NDArray[np.uint8], each: int = 1) -> tuple[list[float], list[float]]:
    """Scores and the largest values of the maps; the highest of so many photographs of each part."""
    scores: list[float] = []
    peaks: list[float] = []
    if detector.config.tile is not None:
        predictions = [detector.predict(photo.transpose(1, 2, 0)) for photo in photos]
        return [p.score for p in predictions], [float(p.input_map.max()) for p in predictions]
    for start in range(0, len(photos), 16):
        seen = [detector.preprocessing(photo.transpose(1, 2, 0)) for photo in photos[start : start + 16]]
        some, maps = detector.score_images(np.ascontiguousarray(np.stack(seen).transpose(0, 3, 1, 2)))
        scores += some.tolist()
        peaks += maps.max((1, 2, 3)).tolist()
    by_part = (np.reshape(values, (-1, each)).max(1).tolist() for values in (scores, peaks))
    return next(by_part), next(by_part)


def summarised(rows: Sequence[dict[str, Any]], splits: int, trainings: int) -> list[dict[str, Any]]:
    """A row for each category, rule and rate: means over the splits, and the standard error of the false alarms."""
    table = []
    for category in dict.fromkeys(row["category"] for row in rows):
        mine = [row for row in rows if row["category"] == category]
        outcomes: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in mine:
            for turn in range(max(1, splits // trainings)):
                for key, outcome in split(row, turn, again=splits > trainings).items():
                    outcomes.setdefault(key, []).append(outcome)
        for (rule, rate), found in outcomes.items():
            alarms, recall = zip(*found, strict=True)
            table.append(
                {
                    "category": category,
                    "rule": rule,
                    "promised": rate,
                    "false_alarms": f"{statistics.mean(alarms):.4f}",
                    "standard_error": f"{statistics.pstdev(alarms) / len(alarms) ** 0.5:.4f}",
                    "recall": f"{statistics.mean(recall):.4f}",
                    "splits": len(alarms),
                    "trainings": len(mine),
                    "size": mine[0]["size"],
                }
            )
    return table


def split(row: dict[str, Any], turn: int, again: bool) -> dict[tuple[str, str], tuple[float, float]]:
    """(rule, promise) → share of good images stopped, share of defects stopped."""
    values = {key: np.array(row[key]) for key in row if key not in ("category", "fit", "size")}
    rng = np.random.default_rng([row["fit"], turn])
    one, other = np.array_split(rng.permutation(len(values["good"])), 2)
    bad_one, bad_other = np.array_split(rng.permutation(len(values["bad"])), 2)
    found = {}
    for rule, end, before in (("kizu", "", "level_from"), ("kizu, any pixel", "_peaks", "map_level_from")):
        good, bad = values["good" + end], values["bad" + end]
        level_from, rest = (good[one], good[other]) if again else (values[before], good)
        for rate in RATES:
            level = calibrate(level_from.tolist(), rate).value
            found[rule, f"{rate:g}"] = float((rest > level).mean()), float((bad > level).mean())
    good, bad = values["good"], values["bad"]
    level_from, rest = (good[one], good[other]) if again else (values["level_from"], rng.permutation(good))
    test = DriftTest(level_from.tolist(), 0.1, seed=row["fit"])
    for score in rest.tolist():
        test.add("", score)
    alarm = test.alarm_at is not None
    for score in bad.tolist():
        test.add("", score)
    found["drift", "0.1"] = float(alarm), float(test.alarm_at is not None)
    for rate in RATES:
        level = float(np.quantile(values["learned"], 1 - rate))
        found["quantile", f"{rate:g}"] = float((good > level).mean()), float((bad > level).mean())
    for rule, level in {"F1-max": best_f1(good[one], bad[bad_one]), "largest": float(good[one].max())}.items():
        found[rule, "none"] = float((good[other] > level).mean()), float((bad[bad_other] > level).mean())
    return found


def best_f1(good: Scores, bad: Scores) -> float:
    """The level above which F1 is largest on labelled scores."""
    cuts = np.unique(np.concatenate([good, bad]))
    hits = len(bad) - np.searchsorted(np.sort(bad), cuts)
    alarms = len(good) - np.searchsorted(np.sort(good), cuts)
    at_or_above = np.nextafter(cuts, -np.inf)
    return float(at_or_above[(2 * hits / (hits + alarms + len(bad))).argmax()])


if __name__ == "__main__":
    main()
