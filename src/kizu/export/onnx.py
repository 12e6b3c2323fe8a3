"""A trained model as one graph for onnxruntime or OpenVINO: written only where it says what torch says."""

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kizu.data import files
from kizu.data.preprocessing import batches, whole
from kizu.data.progress import Progress, silent
from kizu.data.streams import drawn, endless
from kizu.detectors.base import Detector
from kizu.detectors.loading import load as load_trained
from kizu.detectors.patchcore.memory_bank import Bank
from kizu.errors import BadImage, ModelError, OptionError, require
from kizu.export.precision import MIN_HALVED_SIZE, halve, quantise
from kizu.inference import model_folder, model_json
from kizu.inference.engines import open_graph
from kizu.inference.exported import CASES, OWN_VERDICTS, TABLES, Exported
from kizu.inference.exported import load as load_exported
from kizu.inference.parity import Cases, Tolerance
from kizu.inference.prediction import readable

__all__ = ["Format", "Precision", "cut_paste", "export"]

Format = Literal["onnx", "openvino"]
Precision = Literal["float32", "float16", "int8"]
Pixels = npt.NDArray[np.uint8]  # (N, 3, H, W)

OPSET = 20
MAX_PHOTOS = 32  # that are compared, each with a changed copy
NUM_DRAWN = 16  # pictures, compared where there are no photographs
MIN_PHOTOS = 8  # a lower precision is measured on no fewer
NUM_CASES = 8  # that go into the model
BATCH = 4  # images in one run of torch
NUM_TIMED_RUNS = 10
PRECISION_MARGIN = 2  # a lower precision may be off by this much more than it was when it was measured
NEEDS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}


def export(
    detector: Detector,
    folder: str | os.PathLike[str],
    to: Format = "onnx",
    *,
    precision: Precision = "float32",
    photographs: Iterable[Any] = (),
    tolerance: float = 0.02,
    progress: Progress = silent,
) -> Exported:
    """Write a detector's whole graph and all that it takes to run it without torch, as a folder, or nothing at all.

    On `photographs` of good parts, and copies with a patch in the wrong place, torch and the exported graph are
    compared; without them it is on the model's thumbnails, or drawn pictures. A lower `precision` needs photographs; it
    may change at most the share `tolerance` of the verdicts. Raises `ModelError` where the graph cannot be exported or
    says anything else, and `MissingExtra` where what writes it is not installed.
    """
    folder = Path(folder)
    for module in NEEDS[to]:
        require(module)
    _check_target(folder)
    copy = _copy(detector)
    photos = _photographs(copy, photographs)
    if precision != "float32":
        _check_measurable(copy, photos, precision)
    pixels = np.concatenate([photos, cut_paste(photos)]) if len(photos) else _drawn(copy)
    truth = _torch_cases(copy, pixels, progress)
    with files.scratch_folder() as scratch, files.new_folder(folder) as temporary:
        progress("Graph", 0, 1)
        plain = Path(scratch, "plain.onnx")
        outputs = _write_graph(copy, plain)
        _deliver(_packed(copy, plain, precision, photos), temporary, to)
        progress("Graph", 1, 1)
        _write_rest(copy, temporary, truth)
        about = copy.describe()
        about["export"] = _facts(to, precision, outputs, len(photos))
        model = Exported(temporary, about, open_graph(temporary, to), {})
        outcome = _outcome(model, truth, progress)
        allowed = Tolerance()
        difference = truth.difference(*outcome, model.threshold.value, allowed)
        if precision != "float32":
            _deliver(plain, Path(scratch, "plain"), to)
            single = Exported(Path(scratch, "plain"), about, open_graph(Path(scratch, "plain"), to), {})
            about["export"]["measured"] = _compared(model, single, truth, tolerance)
            allowed = Tolerance(
                max(allowed.score, PRECISION_MARGIN * difference.score),
                max(allowed.map, PRECISION_MARGIN * difference.map),
            )
            difference = truth.difference(*outcome, model.threshold.value, allowed)
        if not difference.within(allowed):
            raise ModelError(
                f"{folder} was not written, because the exported graph does not say what torch says: "
                f"{difference.sentence(allowed)}"
            )
        about["export"]["parity"] |= {"compared": difference.to_json(), "tolerance": asdict(allowed)}
        model.verify()
        model_json.write(temporary, about)
    return load_exported(folder)


class _Verdict(nn.Module):
    """A detector's graph with everything that follows from it: score, p-value, verdict, map, the method's extras."""

    good: Tensor
    level: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.network, self.detector = detector.graph, detector  # torch.export wants no part of the name graph
        self.register_buffer("good", torch.tensor(detector.calibration_scores, dtype=torch.float64))
        self.register_buffer("level", torch.tensor(detector.threshold.value, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scores, maps, extras = self.detector.forward_with_extras(images)
        exact = scores.double()
        if not self.detector.graph_decides:  # the score that counts follows from the map, outside of the graph
            return scores, maps, *extras.values()
        reached = (self.good >= exact[:, None]).sum(1).double() if len(self.good) else torch.zeros_like(exact)
        return scores, (1 + reached) / (1 + len(self.good)), exact > self.level, maps, *extras.values()


def cut_paste(photos: Pixels) -> Pixels:
    """Copies of photographs with a patch of each pasted elsewhere, more or less visible (CutPaste, Li et al. 2021)."""
    copies = photos.copy()
    height, width = photos.shape[2:]
    for number, (photo, copy) in enumerate(zip(photos, copies, strict=True)):
        rng = np.random.default_rng(number)
        rows, columns = (max(2, int(rng.uniform(0.05, 0.25) * side)) for side in (height, width))
        (top, left), (y, x) = ((rng.integers(height - rows), rng.integers(width - columns)) for _ in range(2))
        share = rng.uniform(0.2, 1)
        patch, covered = photo[:, top : top + rows, left : left + columns], photo[:, y : y + rows, x : x + columns]
        copy[:, y : y + rows, x : x + columns] = np.rint(share * patch + (1 - share) * covered)
    return copies


def _check_target(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        raise ModelError(f"{folder} is a trained model, which an export shall not replace: choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "model.json").exists():
        raise ModelError(f"{folder} exists and is not a kizu model: choose another folder")


def _check_measurable(detector: Detector, photos: Pixels, precision: str) -> None:
    """Raise `OptionError` where there is nothing that a lower precision can be measured on."""
    if len(photos) < MIN_PHOTOS:
        raise OptionError(
            f'`precision="{precision}"` is measured on photographs of good parts, and there are {len(photos)}: give '
            f"{MIN_PHOTOS} or more of them"
        )
    if not detector.threshold.count:
        raise OptionError(f'`precision="{precision}"` is measured by its verdicts, and this model has no threshold')


def _copy(detector: Detector) -> Detector:
    """The same model on the CPU, free of whatever it learned under."""
    detector.check_exportable()
    with files.scratch_folder() as scratch:
        copy = load_trained(detector.save(Path(scratch, "model")))
    assert copy.graph is not None
    copy.device = torch.device("cpu")
    copy.graph.to(copy.device)
    return copy


def _photographs(detector: Detector, given: Iterable[Any]) -> Pixels:
    """At most `MAX_PHOTOS` photographs, or else thumbnails, as the network sees them (N, 3, H, W)."""
    items = [readable(item) for item in given]
    pixels: list[Pixels] = [np.empty((0, 3, *detector.preprocessing.size), np.uint8)]
    if detector.preprocessing.tiling is not None and items:
        return _tiles(detector, [items[number] for number in _spread(items, MAX_PHOTOS)])
    for batch in batches([items[number] for number in _spread(items, MAX_PHOTOS)], detector.preprocessing):
        if batch.failures:
            raise batch.failures[0][1]
        pixels.append(batch.pixels)
    if not items:
        picture = detector.picture if detector.preprocessing.tiling is None else detector.picture_of_tile
        pictures = (picture(number) for number in _spread(detector.thumbnails, MAX_PHOTOS))
        pixels += [seen.transpose(2, 0, 1)[None] for seen in pictures if seen is not None]
    return np.concatenate(pixels)


def _tiles(detector: Detector, items: Sequence[Any]) -> Pixels:
    """At most `MAX_PHOTOS` tiles of large photographs (N, 3, H, W), of each as many, spread over it."""
    pixels: list[Pixels] = []
    for _, photo in whole(items, detector.preprocessing):
        if isinstance(photo, BadImage):
            raise photo
        assert detector.preprocessing.tiling is not None
        grid = detector.preprocessing.tiling.grid((photo.shape[0], photo.shape[1]))
        numbers = _spread(range(len(grid)), max(1, MAX_PHOTOS // len(items)))
        pixels += [grid.seen(photo, number).transpose(2, 0, 1) for number in dict.fromkeys(numbers)]
    return np.stack(pixels)


def _drawn(detector: Detector) -> Pixels:
    return next(endless(drawn(seed=0), detector.preprocessing, NUM_DRAWN))


def _spread(items: Sequence[Any], count: int = NUM_CASES) -> list[int]:
    """Indices of at most `count` items, spread evenly over all of them."""
    return [int(number) for number in np.linspace(0, len(items) - 1, min(count, len(items)))]


def _torch_cases(detector: Detector, pixels: Pixels, progress: Progress) -> Cases:
    """What torch says of the pixels."""
    scores, maps = [], []
    for start in range(0, len(pixels), BATCH):
        batch_scores, batch_maps = detector.score_images(pixels[start : start + BATCH])
        scores.append(batch_scores)
        maps.append(batch_maps)
        progress("torch", min(start + BATCH, len(pixels)), len(pixels))
    return Cases.of(pixels, np.concatenate(scores), np.concatenate(maps))


def _write_graph(detector: Detector, file: Path) -> list[str]:
    """Write the graph as an ONNX file for any number of images; the names of what it gives."""
    module = _Verdict(detector).eval()
    example = torch.zeros(2, 3, *detector.preprocessing.size, dtype=torch.uint8)
    with torch.no_grad():
        own = OWN_VERDICTS if detector.graph_decides else ()
        names = ["score", *own, "map", *detector.forward_with_extras(example)[2]]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                verbose=False,
            )
            program.save(str(file), external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"The graph cannot be exported: {str(error).splitlines()[0]}") from None
    return names


def _packed(detector: Detector, plain: Path, precision: Precision, photos: Pixels) -> Path:
    """The ONNX file of a precision beside the plain one."""
    file = plain.with_name(f"{precision}.onnx")
    if precision == "float32":
        return plain
    if precision == "int8":
        quantise(plain, file, photos)
        return file
    rounded = _copy(detector)
    assert rounded.graph is not None
    with torch.no_grad():
        for name, tensor in rounded.graph.state_dict().items():
            if tensor.dtype == torch.float32 and tensor.ndim >= 2 and tensor.numel() >= MIN_HALVED_SIZE:
                tensor.copy_(tensor.half().float())
                if not tensor.isfinite().all():
                    raise ModelError(f'`precision="float16"`: {name} has numbers beyond its range; use float32')
        for part in rounded.graph.modules():
            if isinstance(part, Bank):
                part.half_norms.copy_(part.entries.square().sum(1) / 2)
    _write_graph(rounded, file)
    halve(file)
    return file


def _deliver(file: Path, folder: Path, to: Format) -> None:
    """Put an ONNX file where its runtime looks for it, in that runtime's form."""
    folder.mkdir(exist_ok=True)
    if to == "onnx":
        shutil.copyfile(file, folder / "model.onnx")
        return
    openvino: Any = require("openvino")
    openvino.save_model(openvino.convert_model(str(file)), str(folder / "model.xml"), compress_to_fp16=False)


def _write_rest(detector: Detector, folder: Path, truth: Cases) -> None:
    """What lies beside the graph: cases, of the lowest and the highest score first, tables, thumbnails."""
    order = truth.scores.argsort().tolist()
    lowest, *others = (order[place] for place in _spread(order))
    truth.take([lowest, *reversed(others)]).write(folder / CASES)
    if tables := {name: tensor.contiguous() for name, tensor in detector.export_tables().items()}:
        save_file(tables, folder / TABLES)
    if detector.thumbnails:
        model_folder.write_thumbnails(folder, detector.thumbnails)


def _facts(to: Format, precision: Precision, outputs: list[str], photographs: int) -> dict[str, Any]:
    """What model.json says of an export, but for what is found by running it."""
    return {
        "format": to,
        "precision": precision,
        "opset": OPSET,
        "providers": ["CPUExecutionProvider" if to == "onnx" else "CPU"],
        "outputs": outputs,
        "versions": {name: version(name) for name in ("onnxruntime", *NEEDS[to])},
        "parity": {"photographs": photographs},
    }


def _outcome(model: Exported, truth: Cases, progress: Progress) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What an exported model says of all cases."""
    scores, maps = [], []
    for start in range(0, len(truth.images), BATCH):
        batch_scores, batch_maps = model.score_images(truth.images[start : start + BATCH])
        scores.append(batch_scores)
        maps.append(batch_maps)
        progress("Parity", min(start + BATCH, len(truth.images)), len(truth.images))
    return np.concatenate(scores), np.concatenate(maps)


def _compared(model: Exported, single: Exported, truth: Cases, tolerance: float) -> dict[str, Any]:
    """A lower precision beside single precision: verdicts and milliseconds. Raises `ModelError` beyond tolerance."""
    threshold = model.threshold.value
    scores, before = model.score_images(truth.images)[0], truth.scores
    changed = int(((scores > threshold) != (before > threshold)).sum())
    precision = model.export["precision"]
    if changed > tolerance * len(scores):
        raise ModelError(
            f'`precision="{precision}"` changes {changed} of {len(scores)} verdicts, and at most {tolerance:.1%} may '
            'change (`tolerance`): the model was not written; use `precision="float32"`'
        )
    return {
        "images": len(scores),
        "verdicts changed": changed,
        "tolerance": tolerance,
        "stopped": int((scores > threshold).sum()),
        "stopped in float32": int((before > threshold).sum()),
        "mean score difference": float((scores - before).mean()),
        "largest score difference": float(np.abs(scores - before).max()),
        "bytes": _bytes(model.folder),
        "bytes in float32": _bytes(single.folder),
        "ms an image": _milliseconds(model, truth.images),
        "ms an image in float32": _milliseconds(single, truth.images),
    }


def _bytes(folder: Path) -> int:
    """The size of the graph in a folder."""
    return sum(path.stat().st_size for path in folder.glob("model.*") if path.suffix != ".json")


def _milliseconds(model: Exported, pixels: Pixels) -> float:
    """The median time of a run on one image, after two runs to warm up."""
    seconds = []
    for number in range(2 + NUM_TIMED_RUNS):
        start = time.perf_counter()
        model(pixels[number % len(pixels)][None])
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds[2:]), 2)
