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

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizu.config import Config, PatchCoreConfig, build
from kizu.data import files, image
from kizu.data.dataset import Dataset, Sample
from kizu.data.masks import Saturations
from kizu.data.progress import Progress, silent
from kizu.errors import DataError, KizuError, OptionError
from kizu.evaluation import tracking
from kizu.evaluation.evaluate import CategoryResult, Picture, evaluate
from kizu.evaluation.operating_point import about_misses
from kizu.evaluation.run_folder import Run, open_run
from kizu.evaluation.tables import predictions_csv, results_csv

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kizu.detectors.base import Detector

__all__ = [
    "Learner",
    "Run",
    "RunOptions",
    "command_line",
    "fingerprint",
    "machine",
    "train",
    "versions",
    "write_tables",
]

log = logging.getLogger("kizu")


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out and what it writes, whatever the method."""

    name: str | None = None  # of the run's folder; by default the first free one of run, run-2, …
    resume: bool = False  # go on with an unfinished run
    overwrite: bool = False  # replace a run of the same name
    skip_bad: bool = False  # leave out training images that cannot be read
    keep_copies: bool = False  # learn from several photographs of one part
    group_by: str | None = None  # what photographs that belong together have in common in their paths
    memory: str | None = None  # bound of the working data; by default half of what is free
    save_maps: bool = False  # write the test images' anomaly maps
    gpu: int | None = None  # number of the GPU; -1: the CPU; by default the first, if there is one
    num_workers: int = 2  # threads that read images
    oracle: bool = False  # also report, marked as such, the round of training that is best on the test images
    save_segmentation_images: bool = False  # write the test photographs with their maps
    track: Sequence[tracking.Service] = ()  # services that log the finished run too
    auto: bool = False  # choose settings from the good photographs, for each category its own
    minutes: float | None = None  # that the choice may take for a category; by default a few trainings' time
    milliseconds: float | None = None  # that a photograph may take with the chosen settings


@dataclass(frozen=True)
class Learner:
    """Who learns in place of this process."""

    detector: "Callable[[Any], Detector]"  # from a config, a detector of the run's method
    about: dict[str, Any]  # what the run is to keep of how it was learned


def train(
    method: str,
    config: Config,
    data: Dataset,
    parent: Path,
    options: RunOptions | None = None,
    *,
    learner: Learner | None = None,
    progress: Callable[[str], Progress] = lambda category: silent,
    spelled: Callable[[str], str] = str,
) -> tuple[Run, list[CategoryResult]]:
    """Fit and evaluate one detector a category, and write the results folder in `parent`.

    A `learner` makes the detectors that learn. In the report, settings that a sentence names are `spelled` as its
    reader knows them.
    """
    from kizu.detectors import detector_class
    from kizu.detectors.fitting import gpu_device

    options = options or RunOptions()
    kind = detector_class(method)
    tracking.check_services(options.track)
    device = None if options.gpu is None else gpu_device(options.gpu)
    start = time.time()
    categories = _learnable(kind, config, data, options.oracle)
    about = _about(method, config, data, categories, options) | ({} if learner is None else learner.about)
    make = kind if learner is None else learner.detector
    results: list[CategoryResult] = []
    with open_run(parent, options.name, about, resume=options.resume, overwrite=options.overwrite) as run:
        try:
            with _logging_to(run.folder / "log.txt"):
                log.info("%s", command_line())
                for remark in data.remarks:
                    log.info("%s", remark)
                for category in categories:
                    result = run.finished(category)
                    if result is None:
                        choice = _chosen(config, data, category, run, options, progress(category))
                        detector = make(build(kind.config_class, choice["config"]) if choice else config)
                        detector.workers = options.num_workers
                        detector.device = device or detector.device
                        result = _fit_and_evaluate(detector, data, category, run, options, progress(category), choice)
                    results.append(result)
                    log.info("%s: %s", category, _one_line(result))
                _finish(run, about | {"remarks": data.remarks}, results, time.time() - start, spelled)
                tracking.log_run(options.track, _record(run.folder, about, results))
                log.info("finished: %s", run.folder)
        except KizuError:
            if not results and not any(run.unfinished.glob("*.checkpoint")):  # nothing to resume: the name is free
                shutil.rmtree(run.folder)
            raise
    return run, results


def _about(method: str, config: Config, data: Dataset, categories: list[str], options: RunOptions) -> dict[str, Any]:
    """What a run that is resumed must have in common with the one that was started."""
    return {
        "method": method,
        "config": config.model_dump(mode="json"),
        "data": str(data.root.resolve()),
        "categories": categories,
        "data_hash": fingerprint(data.samples),
        "oracle": options.oracle,
        **({"auto": True} if options.auto else {}),
        **({"group_by": options.group_by} if options.group_by else {}),
        **({"saturations": _plain(data.saturations)} if data.saturations else {}),
    }


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


def _chosen(
    config: Config,
    data: Dataset,
    category: str,
    run: Run,
    options: RunOptions,
    progress: Progress,
) -> dict[str, Any]:
    """How the settings of a category were chosen, `Choice.to_json`; nothing if they were not to be."""
    if not options.auto:
        return {}
    from kizu.evaluation.choice.choose import choose

    path = run.unfinished / f"{category}.choice.json"
    if not path.exists():
        good = data.select(category, "train")
        choice = choose(
            good,
            config,
            minutes=options.minutes,
            milliseconds=options.milliseconds,
            group_by=options.group_by,
            workers=options.num_workers,
            progress=progress,
        )
        files.write_text(path, json.dumps(choice.to_json()))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    log.info("%s: %s", category, found["sentence"])
    return found


def _fit_and_evaluate(
    detector: "Detector",
    data: Dataset,
    category: str,
    run: Run,
    options: RunOptions,
    progress: Progress,
    choice: dict[str, Any],
) -> CategoryResult:
    """One category: learn, evaluate, write the model and the result. An oracle watches from the first round."""
    from kizu.evaluation.oracle import Oracle

    test = data.select(category, "test")
    oracle = Oracle(detector, test) if options.oracle else None
    detector.fit(
        data.select(category, "train"),
        held_out=data.select(category, "validation"),
        skip_bad=options.skip_bad,
        keep_copies=options.keep_copies,
        group_by=options.group_by,
        memory=options.memory,
        checkpoint=run.checkpoint(category) if oracle is None else None,
        after_round=None if oracle is None else oracle.measure_round,
        progress=progress,
    )
    result = evaluate(
        detector,
        test,
        category=category,
        root=data.root,
        saturations=data.saturations.get(category),
        maps=run.folder / "maps" if options.save_maps else None,
        overlays=run.folder / "segmentation_images" / category if options.save_segmentation_images else None,
        progress=progress,
    )
    result.choice = choice
    result.notes += about_misses(result, detector.config.false_alarms)
    if oracle is not None:
        oracle.report(result)
    detector.save(run.model(category))
    files.write_text(run.unfinished / f"{category}.json", json.dumps(result.to_json()))
    run.checkpoint(category).unlink(missing_ok=True)
    return result


def _finish(
    run: Run,
    about: dict[str, Any],
    results: Sequence[CategoryResult],
    seconds: float,
    spelled: Callable[[str], str],
) -> None:
    """Tables, report, run.json; then the mark of an unfinished run goes."""
    about = {
        **about,
        "seed": about["config"]["seed"],
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
        "thresholds": {result.category: result.statement for result in results},
        **({"choices": {result.category: result.choice for result in results}} if about.get("auto") else {}),
        "seconds": round(seconds, 2),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_tables(run.folder, about, results, spelled)
    _tensorboard(run.folder / "tensorboard", results)
    if zones := about["config"]["zones"]:
        files.write_text(run.folder / "zones.json", files.json_text(zones) + "\n")
    files.write_text(run.folder / "run.json", files.json_text(about) + "\n")
    run.finish()


def write_tables(
    folder: Path, about: dict[str, Any], results: Sequence[CategoryResult], spelled: Callable[[str], str] = str
) -> None:
    """results.csv, predictions.csv and report.html."""
    from kizu.detectors import detector_class
    from kizu.evaluation.pages import report

    files.write_text(folder / "results.csv", results_csv(results))
    files.write_text(folder / "predictions.csv", predictions_csv(results))
    method, configs = detector_class(about["method"]), [about["config"] | r.choice.get("config", {}) for r in results]
    config = configs[0] if all(other == configs[0] for other in configs) else about["config"]
    summary = report.RunSummary(
        title=", ".join(result.category for result in results[:3]) + (" …" if len(results) > 3 else ""),
        method=about["method"],
        data=about["data"],
        backbone=method.pretrained_name(build(method.config_class, config)),
        size=", ".join(dict.fromkeys(_sizes(build(method.config_class, other)) for other in configs)),
        settings={key: str(value) for key, value in config.items()} | _zone_names(config),
        machine=about["machine"]["summary"],
        versions=about["versions"],
        command=about["command"],
        seed=config["seed"],
        seconds=about["seconds"],
        remarks=about.get("remarks", []),
        spelled=spelled,
    )
    report.write(folder / "report.html", summary, results)


def _zone_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Of zones, which have many numbers, the names."""
    zones = [f"{zone['name']} (ignored)" if zone["ignored"] else zone["name"] for zone in config.get("zones", ())]
    return {"zones": ", ".join(zones)} if zones else {}


def _sizes(config: Config) -> str:
    """448×448, or the sizes at which PatchCore looks at a photograph."""
    sizes = sorted(look.size for look in config.looks) if isinstance(config, PatchCoreConfig) else [config.size]
    return " and ".join(f"{height}×{width}" for height, width in sizes)


def _record(folder: Path, about: dict[str, Any], results: Sequence[CategoryResult]) -> tracking.RunRecord:
    return tracking.RunRecord(
        folder.parent.parent.name,
        folder.parent.name,
        folder.name,
        {"method": about["method"], **about["config"]},
        {result.category: result.metrics for result in results},
        {result.category: result.curves for result in results},
    )


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of the files' names in the data set and their contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for sample in samples for path in (sample.path, *sample.masks)}):
        digest.update(os.fsencode(path.name))
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError:
            digest.update(b"unreadable")
    for shapes in sorted(repr(sample.shapes) for sample in samples if sample.shapes):
        digest.update(shapes.encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    packages = ("kizu", "numpy", "pillow", "scikit-learn", "scipy", "timm", "torch", "torchvision")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> dict[str, Any]:
    """This computer: its system, cores and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = os.cpu_count() or 1
    summary = f"{platform.system()} {platform.machine()}, {cores} cores, " + (", ".join(gpus) or "no GPU")
    return {"summary": summary, "system": platform.platform(), "cores": cores, "gpus": gpus}


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _plain(saturations: Mapping[str, Saturations]) -> dict[str, Any]:
    """Saturations in the form that JSON gives back."""
    return {
        category: {str(value): list(saturation) for value, saturation in table.items()}
        for category, table in saturations.items()
    }


def _one_line(result: CategoryResult) -> str:
    known = ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items() if value is not None)
    return f"{known or 'no metrics'}; {result.statement}"


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
                scores = [r.score for r in result.scores if r.score is not None and (r.defect != "good") == defective]
                if scores:
                    import numpy as np

                    writer.add_histogram(f"scores/{label}", np.asarray(scores))
            for picture in result.pictures:
                writer.add_image(f"{picture.why}/{picture.image}", _views(picture), dataformats="HWC")


def _views(picture: Picture) -> "npt.NDArray[np.uint8]":
    """The photograph, its anomaly map, and both, side by side."""
    import numpy as np

    shown = (picture.photo, picture.heat, picture.overlay)
    return np.concatenate([image.from_data_uri(view) for view in shown], axis=1)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
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
        with suppress(OSError):  # of a full disk, which whatever else is written there says with its name
            handler.close()
