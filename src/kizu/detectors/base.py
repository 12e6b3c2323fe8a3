"""What every detector is: an inspector that learns from good images, as one graph; saved as a folder."""

import json
import math
import os
import shutil
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kizu.calibration.outliers import suspects
from kizu.calibration.threshold import calibrate, refuse
from kizu.config import CONFIGS, Config, build
from kizu.data import dataset, files
from kizu.data import image as images
from kizu.data.preprocessing import Preprocessing, Readable, Stack, batches
from kizu.detectors import detector_class
from kizu.detectors.augmentation import Augmentation
from kizu.detectors.ram import budget, release
from kizu.errors import BadImage, DataError, ModelError, OptionError
from kizu.features.backbone import weights_hash
from kizu.inference import model_folder as saved
from kizu.inference.inspector import BATCH, Inspector, Photo, Prediction, name_of, readable

__all__ = ["Detector", "Learned", "Photo", "Prediction", "gpu_device", "load", "name_of"]

LEARNED = {"cpu": 4, "cuda": 32}  # images at a time: on a CPU more are no faster and take more memory
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class Learned:
    """What a method makes of good images: the finished graph, and what the graph says of images held out."""

    graph: nn.Module
    scores: list[float]
    map_peaks: list[float]  # the maximum of each held-out image's map
    map_median: float  # the typical value of a good pixel
    facts: dict[str, Any] = field(default_factory=dict)  # worth knowing, e.g. the size of a memory bank
    as_new: dict[int, float] = field(default_factory=dict)  # scores of training images as if they had not been learned
    judged: list[int] = field(default_factory=list)  # which of the held-out images, or else photos, the scores are of


class Detector(Inspector):
    """Base of all methods. A method gives `learn` and `restore_graph`; everything else is common.

    After `fit` or `load`, `graph` is the whole detector: uint8 images (B, 3, H, W) in, scores (B,) and anomaly maps
    (B, 1, H, W) out.
    """

    learns_in_rounds: ClassVar[bool] = False

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        """From a config, or from its fields as keyword arguments. Raises `OptionError` for a wrong one."""
        kind = CONFIGS[self.method]
        self.config: Any = config if config is not None else build(kind, settings)
        super().__init__(Preprocessing(self.config.size, self.config.resize), self.config.false_alarms)
        self.augmentation = Augmentation.of(self.config)
        self.graph: nn.Module | None = None
        self.checkpoint: Path | None = None
        self.after_round: Callable[[nn.Module, int], None] = lambda graph, number: None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size: int | None = None  # photographs at a time, instead of what suits the device

    @abstractmethod
    def learn(self, photos: Stack, held_out: Stack, memory: int, progress: Progress) -> Learned:
        """Learn from photos; held_out may be empty. Working data should stay below `memory` bytes."""

    @classmethod
    @abstractmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        """The graph that `tensors` are the state of, on the meta device or with any values."""

    def fit(
        self,
        good: str | os.PathLike[str] | Iterable[Any],
        *,
        held_out: Iterable[Any] = (),
        memory: str | int | None = None,
        skip_bad: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from good images: a folder, or any of paths, arrays, PIL images, encoded bytes and samples.

        Images in `held_out`, if there are any, are not learned from but set the threshold; otherwise each method
        holds out its own. `memory` ("2GB") bounds the working data; without it, half of what is free may be used.
        A method that trains for long writes where it is to the file `checkpoint`, and goes on from there if it exists.
        Raises `DataError` with the list of all images that cannot be read, before any work, unless `skip_bad`, and
        `OptionError` for a rate of false alarms that was asked for and that so few images cannot carry.
        """
        progress = progress or (lambda stage, done, total: None)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.remarks = []
        most = budget(memory)
        if self.device.type == "cuda":
            most = min(most, torch.cuda.mem_get_info(self.device)[0])
        self.seconds = {}
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        with ExitStack() as open_files:
            with self.timed("decode"):
                photos, items = self.read(good, most // 8, skip_bad, progress)
                open_files.enter_context(photos)
                others, _ = self.read(held_out, most // 8, skip_bad, progress)
                open_files.enter_context(others)
            if len(photos) == 0:
                raise DataError("There is no image to learn from.")
            self.check_promise(len(photos), len(others))
            learned = self.learn(photos, others, most, progress)
        self.training = {"images": 0, "names": [], "digests": [], "suspects": []}
        self.remember(photos, items, learned.as_new)
        self.training["hash"] = photos.hash
        return self.adopt(learned)

    def remember(self, photos: Stack, items: Sequence[Readable], as_new: Mapping[int, float]) -> None:
        """What the images just learned from are called and look like, and which of them look unlike the others."""
        before, names = self.training["images"], [name_of(item) for item in items]
        unlike = [{**asdict(one), "number": before + one.number} for one in suspects(as_new, names)]
        self.training["images"] += len(items)
        self.training["names"] += names
        self.training["digests"] += photos.digests
        self.training["suspects"] += unlike
        self.good_items += [item if _is_file(item) else None for item in items]
        if getattr(self.config, "thumbnails", False):
            for start in range(0, len(photos), BATCH):
                some = photos.batch(start, start + BATCH).transpose(0, 2, 3, 1)
                self.thumbnails += [images.encode(picture, "JPEG", quality=85) for picture in some]

    def calibrates_with(self, photos: int, held_out: int) -> int:
        """How many good images set the level: those held out, or else all, where none is lost by judging it as new."""
        return held_out or photos

    def check_promise(self, photos: int, held_out: int) -> None:
        """Raise `OptionError` where a rate was asked for that so many images cannot carry; the default may be."""
        if "false_alarms" in self.config.model_fields_set:
            refuse(self.config.false_alarms, self.calibrates_with(photos, held_out))

    def adopt(self, learned: Learned) -> Self:
        """Take what was learned, and set the levels from it."""
        rate = self.config.false_alarms
        self.graph = learned.graph.eval()
        self.facts = learned.facts
        self.calibration_scores, self.map_peaks = learned.scores, learned.map_peaks
        self.threshold = calibrate(learned.scores, rate)
        self.map_level = calibrate(learned.map_peaks, rate).value
        top = self.map_level if math.isfinite(self.map_level) else learned.map_median + 1
        self.scale = (learned.map_median, 2 * top - learned.map_median)  # the level lies in the middle
        return self

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[images.Float, images.Float]:
        if self.graph is None:
            raise ModelError("This detector has learned nothing yet: call fit first, or kizu.load a saved model.")
        with torch.inference_mode():
            scores, maps = self.graph(torch.from_numpy(pixels).to(self.device))
        return scores.numpy(force=True), maps.numpy(force=True)

    def tell(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The graph on a batch (B, 3, h, w), and by name whatever else an exported graph shall give of each image."""
        assert self.graph is not None
        return *self.graph(images), {}

    def keepsakes(self) -> dict[str, Tensor]:
        """What an exported model needs beside its graph to say more than scores and maps."""
        return {}

    def save(self, folder: str | os.PathLike[str], *, keep_previous: bool = False) -> Path:
        """Write the model as a folder of model.safetensors and model.json, whole or not at all.

        A model that is there already is replaced, or kept in the sub-folder `previous`; a folder that is something else
        is left alone with a `ModelError`.
        """
        folder = Path(folder)
        if self.graph is None:
            raise ModelError("There is nothing to save: call fit first.")
        if folder.exists() and any(folder.iterdir()) and not (folder / "model.json").exists():
            raise ModelError(f"{folder} exists and is not a kizu model: choose another folder")
        state = {key: tensor.contiguous().cpu() for key, tensor in self.graph.state_dict().items()}
        with files.new_folder(folder) as temporary:
            save_file(state, temporary / "model.safetensors")
            text = json.dumps(self.describe(), indent=1, ensure_ascii=False)
            (temporary / "model.json").write_text(text + "\n", encoding="utf-8")
            if self.thumbnails:
                saved.write_thumbnails(temporary, self.thumbnails)
            if keep_previous and (folder / "model.json").exists():
                (temporary / "previous").mkdir()
                for name in ("model.safetensors", "model.json", saved.THUMBNAILS):
                    if (folder / name).exists():
                        shutil.copy2(folder / name, temporary / "previous" / name)
        return folder

    def describe(self) -> dict[str, Any]:
        """Everything about the model but its tensors, as plain values: what model.json holds."""
        assert self.graph is not None
        return {
            "format": saved.FORMAT,
            "method": self.method,
            "config": self.config.model_dump(mode="json"),
            "backbone": self.pretrained(),
            "threshold": {
                "value": self.threshold.value if self.threshold.count else None,
                "rate": self.threshold.rate,
                "count": self.threshold.count,
                "tuned": self.threshold.tuned,
            },
            "calibration_scores": self.calibration_scores,
            "map": {
                "level": self.map_level if self.threshold.count else None,
                "scale": list(self.scale),
                "peaks": self.map_peaks,
            },
            "facts": self.facts,
            "training": self.training,
            "versions": {name: version(name) for name in ("kizu", "torch", "timm", "numpy", "pillow")},
        }

    def pretrained(self) -> dict[str, str]:
        """The network inside that was trained on other photographs: its name and the hash of its weights."""
        assert self.graph is not None
        return {"name": self.config.backbone, "weights": weights_hash(self.graph)}

    @torch.inference_mode()
    def judged(
        self,
        graph: nn.Module,
        photos: Stack,
        progress: Progress,
        *,
        only: Sequence[int] | None = None,
        facts: dict[str, Any] | None = None,
        usual: float = 0.0,
    ) -> Learned:
        """A finished graph, and what it says of photos, or only of some, that it was not trained on.

        `usual` is the typical value of a good pixel where there are no photos.
        """
        scores: list[float] = []
        peaks: list[float] = []
        medians: list[float] = []
        for _, pixels in self.stream(photos, "Threshold", progress, only=only):
            some, maps = graph(pixels)
            scores += some.tolist()
            peaks += maps.flatten(1).amax(1).tolist()
            medians += maps.flatten(1).median(1).values.tolist()
        median = statistics.median(medians) if medians else usual
        numbers = list(range(len(photos)) if only is None else only)
        return Learned(graph, scores, peaks, median, self.facts if facts is None else facts, judged=numbers)

    def stream(
        self, photos: Stack, stage: str, progress: Progress, *, only: Sequence[int] | None = None, copies: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers (B,) and pixels (B, 3, h, w) of photos, or only of some, batch by batch on the device, with progress.

        After all of them come `copies` varied ones of each, numbered as their originals.
        """
        numbers = range(len(photos)) if only is None else only
        total = len(numbers) * (1 + copies)
        batch = self.batch_size or LEARNED.get(self.device.type, BATCH)
        for turn in range(1 + copies):
            for start in range(0, len(numbers), batch):
                some = numbers[start : start + batch]
                yield torch.tensor(some, device=self.device), self.pixels(photos, some, turn)
                progress(stage, turn * len(numbers) + start + len(some), total)

    def pixels(self, photos: Stack, numbers: Sequence[int], turn: int = 0) -> Tensor:
        """Photos (B, 3, h, w) on the device: as they are at turn 0, at any other varied in its own way."""
        taken = torch.from_numpy(photos.take(numbers))
        if turn and self.augmentation is not None:
            taken, _ = self.augmentation(taken, [(self.config.seed, number, turn) for number in numbers])
        return taken.to(self.device)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[stage]`; leave no freed memory behind."""
        start = time.perf_counter()
        try:
            yield
        finally:
            release()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def read(
        self, good: str | os.PathLike[str] | Iterable[Any], memory: int, skip_bad: bool, progress: Progress
    ) -> tuple[Stack, list[Readable]]:
        """All photographs, scaled, and what they are from. Raises `DataError` with a list of the unreadable ones."""
        items = _items(good)
        photos = Stack(len(items), self.preprocessing.size, memory)
        read: list[Readable] = []
        bad: list[BadImage] = []
        for batch in batches(items, self.preprocessing, workers=self.workers):
            photos.append(batch.pixels)
            read += batch.items
            bad += [error for _, error in batch.failures]
            progress("Reading", len(read) + len(bad), len(items))
        if bad and not skip_bad:
            photos.__exit__()
            listing = "\n".join(f"  {error}" for error in bad)
            raise DataError(
                f"{len(bad)} of {len(items)} training images cannot be used (--skip-bad leaves them out):\n{listing}"
            )
        return photos, read


def gpu_device(number: int) -> torch.device:
    """A GPU by its number, or the CPU for -1. Raises `OptionError` where there is none of that number."""
    count = torch.cuda.device_count()
    if number >= count:
        raise OptionError(f"--gpu {number}: this machine has {count} that torch can use; -1 is the CPU")
    return torch.device("cpu" if number < 0 else f"cuda:{number}")


def load(folder: str | os.PathLike[str]) -> Detector:
    """Read a model that `save` wrote. Nothing in it is executed. Raises `ModelError` when it is none, or damaged."""
    folder = Path(folder)
    about = saved.description(folder)
    if "export" in about:
        raise ModelError(
            f"{folder} is an exported model, which cannot be changed: use the one that it was exported from"
        )
    try:
        packed = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a kizu model: model.safetensors is missing") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None
    tensors = {key: tensor.clone() for key, tensor in packed.items()}  # aligned: the last bit depends on it
    try:
        kind = detector_class(about["method"])
        detector = kind(build(CONFIGS[about["method"]], about["config"]))
        graph = kind.restore_graph(detector.config, tensors)
        graph.load_state_dict(tensors, assign=True)
        detector.graph = graph.eval().requires_grad_(False).to(detector.device)
        detector.restore_levels(about)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None
    detector.thumbnails = saved.thumbnails(folder)
    return detector


def _items(good: str | os.PathLike[str] | Iterable[Any]) -> list[Readable]:
    """Whatever `fit` takes, as a list of things to read."""
    if isinstance(good, str | os.PathLike):
        found = dataset.find(Path(good))
        if len(found.categories) > 1:
            raise DataError(f"{good} holds {len(found.categories)} categories; fit one: {', '.join(found.categories)}")
        return list(found.select(split="train"))
    return [readable(item) for item in good]


def _is_file(item: Readable) -> bool:
    """Whether an image can be read again without being kept in memory."""
    return isinstance(item, dataset.Sample) or isinstance(getattr(item, "source", None), str | os.PathLike)
