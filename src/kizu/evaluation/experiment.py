"""The results folder: models, tables, report, log; started, killed, resumed, finished.

<output>/<project>/<group>/<run>/
├── models/<category>/          one model each, written whole
├── tensorboard/
├── results.csv                 a row a category, the last one their mean
├── predictions.csv             a row a test image
├── report.html
├── maps/<category>/test/       anomaly maps, if asked for
├── run.json                    config, seed, versions, machine, hash of the data
├── log.txt
├── segmentation_images/        if asked for: test photographs with their maps
└── unfinished/                 while the run lasts; a folder that has it is not a result
"""

import csv
import hashlib
import io
import json
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizu.calibration.threshold import p_value
from kizu.config import Config, build
from kizu.data import files
from kizu.data.dataset import Dataset, Sample
from kizu.data.loco_masks import Saturations
from kizu.data.progress import Progress, silent
from kizu.errors import DataError, KizuError, OptionError
from kizu.evaluation import tracking
from kizu.evaluation.evaluate import CategoryResult, evaluate

if TYPE_CHECKING:
    from kizu.detectors.base import Detector

__all__ = ["Run", "command_line", "fingerprint", "machine", "predictions_csv", "results_csv", "train", "write_tables"]

log = logging.getLogger("kizu")

COLUMNS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro", "pg2", "pb2")
ORACLE = (*COLUMNS, "round")
COUNTS = ("train_images", "test_good", "test_defective", "false_alarms", "misses")


@dataclass(frozen=True)
class Run:
    """Where a run writes to."""

    folder: Path

    @property
    def unfinished(self) -> Path:
        return self.folder / "unfinished"

    def model(self, category: str) -> Path:
        return self.folder / "models" / category

    def checkpoint(self, category: str) -> Path:
        """Where training is, for methods that learn in rounds."""
        return self.unfinished / f"{category}.checkpoint"

    def finished(self, category: str) -> CategoryResult | None:
        """The result of a category that is done already."""
        path = self.unfinished / f"{category}.json"
        if not path.exists() or not (self.model(category) / "model.json").exists():
            return None
        return CategoryResult.from_json(json.loads(path.read_text(encoding="utf-8")))


def open_run(parent: Path, name: str | None, about: dict[str, Any], *, resume: bool, overwrite: bool) -> Run:
    """A new run folder, or an unfinished one to go on with.

    Without a name the first free one of run, run-2, … is taken, or with `resume` the last of them. Raises `OptionError`
    rather than mix two runs or overwrite one that was not meant.
    """
    if name is None:
        taken = list(takewhile(lambda candidate: (parent / candidate).exists(), _names()))
        name = taken[-1] if resume and taken else next(islice(_names(), len(taken), None))
    run = Run(parent / name)
    if run.folder.exists() and resume:
        if not run.unfinished.exists():
            raise OptionError(
                f"{run.folder} is finished: there is nothing to resume (a new run needs no `resume=True`)"
            )
        before = json.loads((run.unfinished / "run.json").read_text(encoding="utf-8"))
        changed = [key for key in about if before.get(key) != about[key]]
        if changed:
            raise OptionError(
                f"{run.folder} was started with another {', '.join(changed)}: `resume=True` needs the same"
            )
        return run
    if run.folder.exists():
        if not overwrite:
            raise OptionError(
                f"{run.folder} exists: choose another `name`, or replace it with `overwrite=True`, or go on with "
                "`resume=True`"
            )
        if any(run.folder.iterdir()) and not (run.unfinished.exists() or (run.folder / "run.json").exists()):
            raise OptionError(f"{run.folder} exists and is no run of kizu: choose another `name`")
        shutil.rmtree(run.folder)
    run.unfinished.mkdir(parents=True)
    files.write_text(run.unfinished / "run.json", json.dumps(about, indent=1))
    return run


def _names() -> Iterator[str]:
    yield "run"
    yield from (f"run-{number}" for number in count(2))


def train(
    method: str,
    config: Config,
    data: Dataset,
    parent: Path,
    *,
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    memory: str | None = None,
    save_maps: bool = False,
    gpu: int | None = None,
    num_workers: int = 2,
    oracle: bool = False,
    save_segmentation_images: bool = False,
    track: Sequence[tracking.Service] = (),
    progress: Callable[[str], Progress] = lambda category: silent,
) -> tuple[Run, list[CategoryResult]]:
    """Fit and evaluate one detector a category, and write the results folder.

    `oracle` adds, marked, the metrics of the round of training that is the best on the test images. The services in
    `track` are told of the finished run.
    """
    from kizu.detectors import detector_class
    from kizu.detectors.base import gpu_device

    kind = detector_class(method)
    tracking.check(track)
    device = None if gpu is None else gpu_device(gpu)
    start = time.time()
    categories = _learnable(kind, config, data, oracle)
    about = _about(method, config, data, categories, oracle)
    run = open_run(parent, name, about, resume=resume, overwrite=overwrite)
    results: list[CategoryResult] = []
    try:
        with _logging_to(run.folder / "log.txt"):
            log.info("%s", command_line())
            for category in categories:
                result = run.finished(category)
                if result is None:
                    detector = kind(config)
                    detector.workers = num_workers
                    detector.device = device or detector.device
                    learning = {"skip_bad": skip_bad, "memory": memory, "progress": progress(category)}
                    written = {
                        "overlays": run.folder / "segmentation_images" / category if save_segmentation_images else None,
                        "maps": run.folder / "maps" if save_maps else None,
                    }
                    result = _fit_and_evaluate(detector, data, category, run, oracle, learning, written)
                results.append(result)
                log.info("%s: %s", category, _one_line(result))
            _finish(run, about, results, time.time() - start)
            tracking.tell(track, _told(run.folder, about, results))
            log.info("finished: %s", run.folder)
    except KizuError:
        if not results and not any(run.unfinished.glob("*.checkpoint")):  # nothing to resume: the name is free again
            shutil.rmtree(run.folder)
        raise
    return run, results


def _about(method: str, config: Config, data: Dataset, categories: list[str], oracle: bool) -> dict[str, Any]:
    """What a run that is resumed must have in common with the one that was started."""
    settings = {"method": method, "config": config.model_dump(mode="json"), "data": str(data.root.resolve())}
    about = {**settings, "categories": categories, "data_hash": fingerprint(data.samples), "oracle": oracle}
    return about | ({"saturations": _plain(data.saturations)} if data.saturations else {})


def _learnable(kind: "type[Detector]", config: Config, data: Dataset, oracle: bool) -> list[str]:
    """The categories to learn. Raises `OptionError` or `DataError` for what cannot be done, before any work."""
    if oracle and not kind.learns_in_rounds:
        raise OptionError(
            f"`oracle=True`: {kind.method} does not learn in rounds, so there is nothing to choose on the test images"
        )
    categories = [category for category in data.categories if data.select(category, "train")]
    if not categories:
        raise DataError(f"{data.root} holds no training images of good parts")
    for category in categories:
        kind(config).check_promise(len(data.select(category, "train")), len(data.select(category, "validation")))
    return categories


def _fit_and_evaluate(
    detector: "Detector",
    data: Dataset,
    category: str,
    run: Run,
    oracle: bool,
    learning: dict[str, Any],
    written: dict[str, Path | None],
) -> CategoryResult:
    """One category: learn, evaluate, write the model and the result. An oracle watches from the first round."""
    from kizu.evaluation.oracle import Oracle

    test = data.select(category, "test")
    watcher = Oracle(detector, test) if oracle else None
    checkpoint = None if oracle else run.checkpoint(category)
    held_out = data.select(category, "validation")
    detector.fit(
        data.select(category, "train"),
        held_out=held_out,
        checkpoint=checkpoint,
        after_round=None if watcher is None else watcher.look,
        **learning,
    )
    result = evaluate(
        detector,
        test,
        category=category,
        root=data.root,
        saturations=data.saturations.get(category),
        progress=learning["progress"],
        **written,
    )
    if watcher is not None:
        watcher.report(result)
    detector.save(run.model(category))
    files.write_text(run.unfinished / f"{category}.json", json.dumps(result.to_json()))
    run.checkpoint(category).unlink(missing_ok=True)
    return result


def _finish(run: Run, about: dict[str, Any], results: Sequence[CategoryResult], seconds: float) -> None:
    """Tables, report, run.json; then the mark of an unfinished run goes."""
    about = {
        **about,
        "seed": about["config"]["seed"],
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
        "thresholds": {result.category: result.statement for result in results},
        "seconds": round(seconds, 2),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_tables(run.folder, about, results)
    _tensorboard(run.folder / "tensorboard", results)
    files.write_text(run.folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(run.unfinished)


def write_tables(folder: Path, about: dict[str, Any], results: Sequence[CategoryResult]) -> None:
    """results.csv, predictions.csv and report.html."""
    from kizu.detectors import detector_class
    from kizu.evaluation import report

    files.write_text(folder / "results.csv", results_csv(results))
    files.write_text(folder / "predictions.csv", predictions_csv(results))
    method, config = detector_class(about["method"]), about["config"]
    summary = report.RunSummary(
        title=", ".join(result.category for result in results[:3]) + (" …" if len(results) > 3 else ""),
        method=about["method"],
        data=about["data"],
        backbone=method.pretrained_name(build(method.config_class, config)),
        size="×".join(str(side) for side in config["size"]),
        settings={key: str(value) for key, value in config.items()},
        machine=about["machine"]["summary"],
        versions=about["versions"],
        command=about["command"],
        seed=config["seed"],
        seconds=about["seconds"],
    )
    report.write(folder / "report.html", summary, results)


def _told(folder: Path, about: dict[str, Any], results: Sequence[CategoryResult]) -> tracking.Told:
    return tracking.Told(
        folder.parent.parent.name,
        folder.parent.name,
        folder.name,
        {"method": about["method"], **about["config"]},
        {result.category: result.metrics for result in results},
        {result.category: result.curves for result in results},
    )


def results_csv(results: Sequence[CategoryResult]) -> str:
    """A row a category, metrics to six places, n/a where there is none, and the mean of what there is.

    Columns that begin with oracle_, if there are any, are of the round of training that is the best on the test images.
    """
    rows = []
    columns = [*COLUMNS, *dict.fromkeys(name for r in results for name in r.metrics if name not in COLUMNS)]
    chosen = ORACLE if any(result.oracle for result in results) else ()
    for result in results:
        counts: tuple[float, ...] = (
            result.train_images,
            result.count(defective=False),
            result.count(defective=True),
            result.count(defective=False, stopped=True),
            result.count(defective=True, stopped=False),
        )
        spent = sum(seconds for stage, seconds in result.seconds.items() if stage != "per image")
        per_image = 1000 * result.seconds.get("per image", 0.0)
        best = (result.oracle.get(name) for name in chosen)
        rows.append([*(result.metrics.get(name) for name in columns), *counts, per_image, spent, *best])
    means = [_mean(column) for column in zip(*rows, strict=True)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    marked = [f"oracle_{name}" for name in chosen]
    writer.writerow(["category", *columns, *COUNTS, "ms_per_image", "seconds", *marked])
    for label, row in zip([*(result.category for result in results), "mean"], [*rows, means], strict=True):
        places = [6] * len(columns) + [1 if label == "mean" else 0] * len(COUNTS) + [1, 2]
        places += [6] * (len(chosen) - 1) + [0] if chosen else []
        cells = ("n/a" if v is None else f"{v:.{digits}f}" for v, digits in zip(row, places, strict=True))
        writer.writerow([label, *cells])
    return table.getvalue()


def predictions_csv(results: Sequence[CategoryResult]) -> str:
    """A row a test image: what it is, its score and the verdict, or why there is none."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["category", "image", "defect", "score", "p_value", "verdict", "threshold", "error"])
    for result in results:
        for row in result.judged:
            score = "" if row.score is None else f"{row.score:.9g}"
            p = "" if row.score is None else f"{p_value(row.score, result.calibration_scores):.6g}"
            verdict = "error" if row.score is None else ("stop" if row.score > result.threshold else "pass")
            level = f"{result.threshold:.9g}"
            writer.writerow([result.category, row.image, row.defect, score, p, verdict, level, row.error])
    return table.getvalue()


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of the files' names in the data set and their contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for sample in samples for path in (sample.path, *sample.masks)}):
        digest.update(path.name.encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    packages = ("kizu", "numpy", "pillow", "scikit-learn", "scipy", "timm", "torch", "torchvision")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> dict[str, Any]:
    """What this computer is."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = os.cpu_count() or 1
    summary = f"{platform.system()} {platform.machine()}, {cores} cores, " + (", ".join(gpus) or "no GPU")
    return {"summary": summary, "system": platform.platform(), "cores": cores, "gpus": gpus}


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _plain(saturations: Mapping[str, Saturations]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {
        category: {str(value): list(saturation) for value, saturation in table.items()}
        for category, table in saturations.items()
    }


def _one_line(result: CategoryResult) -> str:
    known = ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items() if value is not None)
    return f"{known or 'no metrics'}; {result.statement}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _tensorboard(folder: Path, results: Sequence[CategoryResult]) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for result in results:
        with SummaryWriter(str(folder / result.category)) as writer:
            for key, value in result.metrics.items():
                if value is not None:
                    writer.add_scalar(key, value)
            for name, values in result.curves.items():
                for number, value in enumerate(values, 1):
                    writer.add_scalar(name, value, number)
            for stage, seconds in result.seconds.items():
                writer.add_scalar(f"seconds/{stage.replace(' ', '_')}", seconds)
            for label, defective in (("good", False), ("defective", True)):
                scores = [r.score for r in result.judged if r.score is not None and (r.defect != "good") == defective]
                if scores:
                    import numpy as np

                    writer.add_histogram(f"scores/{label}", np.asarray(scores))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except KizuError as error:  # to the file alone: whoever runs this says it to the user
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
