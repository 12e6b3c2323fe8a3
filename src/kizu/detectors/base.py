"""What every detector is: an inspector that learns from good images, as one graph; saved as a folder."""

import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kizu.calibration.copies import first_of_each_part
from kizu.calibration.groups import named, recognised
from kizu.calibration.outliers import find_outliers
from kizu.calibration.sizes import what_matters
from kizu.calibration.threshold import images_needed, refuse
from kizu.config import BackboneConfig, Config, build
from kizu.data import files
from kizu.data.geometry.tiling import TileGrid
from kizu.data.image import Float
from kizu.data.preprocessing import Preprocessing, Readable
from kizu.data.progress import Progress, silent
from kizu.detectors.augmentation import Augmentation
from kizu.detectors.fitting import AfterRound, FitContext, FitResult, Outcomes, View, captures_of, ignore_round, timed
from kizu.detectors.own_rates import with_own_rates
from kizu.detectors.ram import budget
from kizu.detectors.stack import Stack, TiledStack, Tiles, items_of, read_all, show_the_same, thumbnails
from kizu.errors import DataError, ModelError, OptionError
from kizu.features.anomaly_map import learn_units
from kizu.features.backbone import weights_hash
from kizu.features.safe_load import refuse_not_finite
from kizu.features.threads import each_image
from kizu.inference import model_folder, model_json
from kizu.inference.inspector import BATCH, Inspector
from kizu.inference.prediction import name_of, path_of

__all__ = ["UNFITTED", "Detector"]

BATCH_SIZE = {"cpu": 4, "cuda": 32}  # while learning: on a CPU more images are no faster and take more memory
CALIBRATION_BYTES = 1 << 30  # of photographs kept in memory to set a threshold by
HINT = " With `keep_copies=True` they are kept."
UNFITTED = "This detector has learned nothing yet: call fit first, or kizu.load a saved model."


class Detector(Inspector):
    """Base of all methods. A method gives `learn` and `restore_graph`; everything else is common.

    After `fit` or `load`, `graph` is the whole detector: uint8 images (B, 3, H, W) in, scores (B,) and anomaly maps
    (B, 1, H, W) out.
    """

    config_class: ClassVar[type[Config]]
    leaves_groups_out: ClassVar[bool] = False  # scores photos of `context.groups` as if a whole group were new
    learns_in_rounds: ClassVar[bool] = False  # trains, tells `after_round` how far it is, and fills `curves`

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        """From a config, or from its fields as keyword arguments. Raises `OptionError` for a wrong one."""
        self.config: Any = config if config is not None else build(self.config_class, settings)
        super().__init__(Preprocessing.of(self.config.model_dump()), self.config.false_alarms)
        self.augmentation = Augmentation.of(self.config)
        self.graph: nn.Module | None = None
        # with `workers`, where and how fast it works; prediction needs them as well as a fit, which has its own context
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.grouped = False  # whether several photographs of a part count once
        self.batch_size: int | None = None  # photographs at a time, instead of what suits the device

    @abstractmethod
    def learn(self, context: FitContext) -> FitResult:
        """Learn from the context's photographs."""

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
        keep_copies: bool = False,
        group_by: str | Sequence[int] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        after_round: AfterRound | None = None,
    ) -> Self:
        """Learn from good images: a folder, or any of paths, arrays, PIL images, encoded bytes and samples.

        Images in `held_out`, if there are any, are not learned from but set the threshold; otherwise each method
        holds out its own. Of several photographs of one part, saved again or taken in the same moment, the first alone
        is learned from, unless `keep_copies`: the threshold's promise counts parts. Photographs that belong together
        count once, with the highest of their scores: those in whose names the regular expression `group_by` finds the
        same, or of one "folder", or with equal numbers if it is a list of such; without it those that names and
        likeness show to be of one part, unless `keep_copies`; with "none" each is alone.
        `memory` ("2GB") bounds the working data; without it, half of what is free may be used. A method that trains for
        long goes on from the file `checkpoint`, if it exists, and keeps its state there. One that learns in rounds
        calls `after_round` with the graph and the number of the round.
        Raises `DataError` with the list of all images that cannot be read, before any work, unless `skip_bad`, and
        `OptionError` for a rate of false alarms that was asked for and that so few images cannot carry.
        """
        self.remarks, self.seconds, progress = [], {}, progress or silent
        good, memory_bytes = items_of(good), self._memory_bytes(memory)
        with ExitStack() as open_files:
            view = self._look(good, progress)
            with timed("decode", self.seconds):
                photos, items = self.read(good, memory_bytes // 8, skip_bad, progress)
                open_files.enter_context(photos)
                others, other_items = self.read(held_out, memory_bytes // 8, skip_bad, progress)
                open_files.enter_context(others)
                read, every = photos.digests, [*items, *other_items]
                kept = range(len(every)) if keep_copies else self.leave_out_copies(photos, others, every, HINT)
                copies = sorted({*read} - {*photos.digests})
            if len(photos) == 0:
                raise DataError("There is no image to learn from.")
            by = "none" if group_by is None and keep_copies else group_by
            numbers = self._grouped(by, every, kept, [photos, others])
            items, groups = [every[n] for n in kept[: len(photos)]], [numbers[: len(photos)], numbers[len(photos) :]]
            apart = self.grouped or self.preprocessing.tiling is not None  # what is learned from together
            if apart and not len(others) and not self.leaves_groups_out:
                others, items, groups = self._hold_groups_out(photos, items, groups[0])
                open_files.enter_context(others)
            context = FitContext(
                photos=photos.seen if self.leaves_groups_out else open_files.enter_context(photos.seen.at_most()),
                held_out=others.seen,
                groups=photos.of_each_seen(groups[0]) if apart else None,
                view=self._measured(view, [photos, others]),
                memory_bytes=memory_bytes,
                progress=progress,
                checkpoint=None if checkpoint is None else Path(checkpoint),
                after_round=after_round or ignore_round,
                seconds=self.seconds,
            )
            return self._learn_from(context, [photos, others], items, groups, copies)

    def _look(self, good: Sequence[Readable], progress: Progress) -> View:
        """Set how photographs are seen, before any is read for learning."""
        with timed("alignment", self.seconds) if self.config.align else nullcontext():
            view = View.learned(self.config, self.preprocessing, good, progress)
        self.preprocessing = view.preprocessing
        self.remarks += [*view.remarks, *filter(None, [what_matters(self.config)])]
        return view

    def _measured(self, view: View, stacks: Sequence[Stack]) -> View:
        """The same, with the shape of photographs on which sizes are measured, where the settings speak of them."""
        if self.config.measures:
            view = view.measured_by([shape for stack in stacks for shape in stack.shapes], self.remarks)
        self.measure_on(view.measured_on)
        return view

    def _memory_bytes(self, memory: str | int | None) -> int:
        """What may be used of the machine's, and of the GPU's."""
        free = [torch.cuda.mem_get_info(self.device)[0]] if self.device.type == "cuda" else []
        return min([budget(memory), *free])

    def _learn_from(
        self,
        context: FitContext,
        stacks: Sequence[Stack],
        items: list[Readable],
        groups: Sequence[Sequence[int]],
        copies: list[str],
    ) -> Self:
        """Learn, remember from what, and set the thresholds; `groups` of the photos, and of those held out."""
        self.check_promise(len({*groups[0]}), len({*groups[1]}))
        self.captures = captures_of(self.config, stacks)
        result = self.learn(context)
        numbers = (groups[1] if len(context.held_out) else groups[0]) if self.grouped else None
        result = with_own_rates(result.of_groups(numbers), self.config, numbers)
        result.facts = {**result.facts, **context.facts(result)}
        self.measure_on(self.measured_on, result.map_levels)
        self.training = {"images": 0, "names": [], "digests": [], "suspects": [], "copies": copies}
        self.good_items, self.thumbnails = [], []
        self.remember(stacks[0], items, result.loo_scores)
        self.training["hash"] = stacks[0].hash
        return self.adopt(result)

    def _grouped(
        self,
        group_by: str | Sequence[int] | None,
        items: Sequence[Readable],
        kept: Sequence[int],
        stacks: Sequence[Stack],
    ) -> Sequence[int]:
        """A number for each photo of the stacks, the `kept` of the items, equal for those that belong together."""
        paths = [path_of(items[number]) for number in kept]
        if isinstance(group_by, str):
            numbers = named(paths, group_by)
        elif group_by is not None:
            if len(group_by) != len(items):
                raise OptionError(f"`group_by` has {len(group_by)} numbers for {len(items)} photographs")
            numbers = [group_by[number] for number in kept]
        else:
            photos = (stack.batch(n, n + 1)[0].transpose(1, 2, 0) for stack in stacks for n in range(len(stack)))
            numbers = recognised(paths, photos) or list(range(len(kept)))
        parts = len({*numbers})
        self.grouped = parts < len(numbers)
        if self.grouped:
            self.remarks.append(
                f"{len(numbers)} photographs show {parts} parts: each part counts once, with the highest score of its "
                "photographs, and the promise is of parts."
            )
        return numbers

    def _hold_groups_out(
        self, photos: Stack, items: list[Readable], groups: Sequence[int]
    ) -> tuple[Stack, list[Readable], list[Sequence[int]]]:
        """Take whole groups from the photos, to set the threshold by.

        Returns these photos, the items that stay, and the groups of those that stay and of those taken.
        """
        every = sorted({*groups})
        if len(every) == 1:
            raise DataError("One photograph cannot be learned from and set the threshold: give more.")
        most = max(1, min(images_needed(self.config.false_alarms), len(every) // 4))
        aside = {*np.random.default_rng(self.config.seed).permutation(every)[:most].tolist()}
        chosen, rest = ([n for n, group in enumerate(groups) if (group in aside) is kind] for kind in (True, False))
        held_out = photos.part(chosen)
        photos.keep(rest)
        return held_out, [items[n] for n in rest], [[groups[n] for n in rest], [groups[n] for n in chosen]]

    def update(
        self,
        good: Any,
        *,
        memory: str | int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Learn more good images without the old ones. Raises `ModelError` where a method cannot."""
        raise ModelError(f"{self.method} cannot be updated: train it again with all images.")

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """One detector from several that learned from different images. Raises `ModelError` where a method cannot."""
        raise ModelError(f"Models of {cls.method} cannot be merged.")

    def calibrate(self, good: str | os.PathLike[str] | Iterable[Any], *, progress: Progress = silent) -> Self:
        """Set the threshold of a finished detector by photographs of good parts that it did not learn from.

        Raises `DataError` where there are none, or some of them cannot be read.
        """
        if self.graph is None:
            raise ModelError(UNFITTED)
        photos, items = self.read(good, CALIBRATION_BYTES, progress=progress)
        with photos:
            kept = self.leave_out_copies(photos, None, items)
            if len(photos) == 0:
                raise DataError("There is no photograph of a good part to set the threshold with.")
            groups = self._grouped(None, items, kept, [photos])
            return self.adopt(self.score_held_out(self.graph, photos.seen, progress).of_groups(groups))

    def leave_out_copies(
        self, photos: Stack, others: Stack | None, items: Sequence[Readable], hint: str = ""
    ) -> Sequence[int]:
        """Keep one photograph of each part: of `photos` the first, of `others` those that none of these shows.

        `items` are what all are read from; returns the numbers of those that stay.
        """
        stacks = [photos] if others is None else [photos, others]
        places = [(stack, n) for stack in stacks for n in range(len(stack))]
        first = first_of_each_part(stack.batch(n, n + 1)[0] for stack, n in places)
        first = [o if n == o or show_the_same(*places[n], *places[o]) else n for n, o in enumerate(first)]
        copies = [number for number, original in enumerate(first) if number != original]
        if not copies:
            return range(len(items))
        kept = [number for number, original in enumerate(first) if number == original]
        examples = f"{name_of(items[copies[0]])} shows that of {name_of(items[first[copies[0]]])}"
        self.remarks.append(
            f"{len(copies)} of {len(items)} photographs show the same part as another one: {examples}. They were left "
            f"out, because the promise counts different parts.{hint}"
        )
        before = len(photos)
        photos.keep([number for number in kept if number < before])
        if others is not None:
            others.keep([number - before for number in kept if number >= before])
        return kept

    def remember(self, photos: Stack, items: Sequence[Readable], loo_scores: Mapping[int, float]) -> None:
        """What the images just learned from are called and look like, and which of them look unlike the others."""
        before, names = self.training["images"], [name_of(item) for item in items]
        outliers = find_outliers(loo_scores, names)
        self.training["images"] += len(items)
        self.training["names"] += names
        self.training["digests"] += photos.digests
        self.training["suspects"] += [{**asdict(outlier), "number": before + outlier.number} for outlier in outliers]
        self.good_items += [None if path_of(item) is None else item for item in items]
        if isinstance(photos, TiledStack):
            self.training.setdefault("shapes", []).extend(list(grid.shape) for grid in photos.tiles.grids)
        if self.keeps_thumbnails:
            for start in range(0, len(photos.seen), BATCH):
                self.thumbnails += thumbnails(photos.seen.batch(start, start + BATCH))

    @property
    def keeps_thumbnails(self) -> bool:
        """Whether the model keeps small pictures of what it learned from, to show them beside what it finds."""
        return False

    def calibrates_with(self, photos: int, held_out: int) -> int:
        """How many good images set the threshold: those held out, or else all, each scored as if it were new."""
        return held_out or photos

    def check_promise(self, photos: int, held_out: int) -> None:
        """Raise `OptionError` where so many images cannot carry a rate that was asked for; the default may pass."""
        if "false_alarms" in self.config.model_fields_set:
            refuse(self.config.false_alarms, self.calibrates_with(photos, held_out))

    def adopt(self, result: FitResult) -> Self:
        """Take what was learned, and set the thresholds from it."""
        rate = self.config.all_false_alarms
        self.graph = result.graph.eval()
        self.facts = result.facts
        self.calibration_scores, self.map_peaks = result.scores, result.map_peaks
        self.threshold = replace(self.calibrated(rate), grouped=self.grouped)
        self.pixel_threshold = self.calibrated_pixels(rate)
        top = self.pixel_threshold if math.isfinite(self.pixel_threshold) else result.map_median + 1
        self.heat_map_range = (result.map_median, 2 * top - result.map_median)  # the pixel threshold lies in the middle
        return self

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[Float, Float]:
        if self.graph is None:
            raise ModelError(UNFITTED)
        with torch.inference_mode():
            scores, maps = each_image(self.graph, torch.from_numpy(pixels).to(self.device))
        return scores.numpy(force=True), maps.numpy(force=True)

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Scores and maps of a batch (B, 3, h, w), and by name what else an exported graph puts out for each image."""
        assert self.graph is not None
        return *self.graph(images), {}

    def export_tables(self) -> dict[str, Tensor]:
        """Tables that an exported model needs beside its graph, to explain what scores and maps alone do not."""
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
        refuse_not_finite(state, "The model")
        with files.new_folder(folder) as temporary:
            save_file(state, temporary / "model.safetensors")
            if self.thumbnails:
                model_folder.write_thumbnails(temporary, self.thumbnails)
            model_json.write(temporary, self.describe())
            if keep_previous and (folder / "model.json").exists():
                (temporary / "previous").mkdir()
                for name in ("model.safetensors", "model.json", model_folder.THUMBNAILS):
                    if (folder / name).exists():
                        shutil.copy2(folder / name, temporary / "previous" / name)
        return folder

    def describe(self) -> dict[str, Any]:
        """Everything about the model but its tensors, as plain values: what model.json holds."""
        assert self.graph is not None
        return {
            "format": model_json.FORMAT,
            "method": self.method,
            "config": self.config.model_dump(mode="json"),
            "backbone": self.pretrained(),
            **({} if (alignment := self.preprocessing.alignment) is None else {"alignment": alignment.to_json()}),
            **({} if self.captures is None else {"captures": self.captures.to_json()}),
            "threshold": {
                "value": self.threshold.value if self.threshold.count else None,
                "rate": self.threshold.rate,
                "count": self.threshold.count,
                "tuned": self.threshold.tuned,
                **({"grouped": True} if self.threshold.grouped else {}),
            },
            "calibration_scores": self.calibration_scores,
            "map": {
                "level": self.pixel_threshold if self.threshold.count else None,
                "scale": list(self.heat_map_range),
                "peaks": self.map_peaks,
            },
            "facts": self.facts,
            "training": self.training,
            "versions": {name: version(name) for name in ("kizu", "torch", "timm", "numpy", "pillow")},
        }

    @classmethod
    def pretrained_name(cls, config: Any) -> str:
        """The network, trained on other photographs, that a method with this config looks through."""
        return config.backbone if isinstance(config, BackboneConfig) else "none"

    def pretrained(self) -> dict[str, str]:
        """That network's name and the hash of its weights."""
        assert self.graph is not None
        return {"name": self.pretrained_name(self.config), "weights": weights_hash(self.graph)}

    def check_exportable(self) -> None:
        """Raise `ModelError` where the model has no exported form."""
        if self.graph is None:
            raise ModelError("There is nothing to export: call fit first.")

    @torch.inference_mode()
    def learn_units(self, graph: nn.Module, photos: Stack, train: Sequence[int], progress: Progress) -> None:
        """Put the scores of several zones into units, by what was learned from: the photos that set no threshold."""
        learn_units(graph, (pixels for _, pixels in self.stream(photos, "Zones", progress, only=train)))

    @torch.inference_mode()
    def score_held_out(
        self,
        graph: nn.Module,
        photos: Stack,
        progress: Progress,
        *,
        only: Sequence[int] | None = None,
        facts: dict[str, Any] | None = None,
        default_median: float = 0.0,
    ) -> FitResult:
        """A finished graph, and what it says of photos, or of `only` these, that it did not learn from.

        Of tiles, all are scored, and each photograph has one score.
        `default_median` stands for the typical value of a good pixel where there are no photos.
        """
        found = self.outcomes(
            lambda: (each_image(graph, pixels) for _, pixels in self.stream(photos, "Threshold", progress, only=only)),
            photos.grids if isinstance(photos, Tiles) else None,
        )
        all_scored = only is None or isinstance(photos, Tiles)
        return FitResult(
            graph,
            found.scores,
            found.peaks,
            found.median(default_median),
            self.facts if facts is None else facts,
            scored_indices=list(range(len(found.scores)) if all_scored else only or ()),
            again=partial(self.score_held_out, graph, photos, silent, only=only, default_median=default_median),
            map_levels=self.map_levels,
        )

    def outcomes(
        self, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], grids: Sequence[TileGrid] | None = None
    ) -> Outcomes:
        """What is kept of scores (B,) and maps (B, 1, H, W) of good images; the first say where sizes begin.

        Where these are of tiles, `grids` are those of each photograph.
        """
        if self.measured_on is not None and self.map_levels is None:
            zones = self.preprocessing.zones
            self.measure_on(self.measured_on, Outcomes.levels(batches(), None if zones is None else zones.numbers))
        return Outcomes.of(batches(), self.size_rules, grids)

    def stream(
        self, photos: Stack, stage: str, progress: Progress, *, only: Sequence[int] | None = None, copies: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and pixels (B, 3, h, w) of photos, or of `only` these, batch by batch on the device.

        After all of them come `copies` varied ones of each, with their originals' indices.
        """
        indices = range(len(photos)) if only is None else only
        total = len(indices) * (1 + copies)
        batch_size = self.batch_size or BATCH_SIZE.get(self.device.type, BATCH)
        for turn in range(1 + copies):
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                yield torch.tensor(batch, device=self.device), self.pixels(photos, batch, turn)
                progress(stage, turn * len(indices) + start + len(batch), total)

    def pixels(self, photos: Stack, indices: Sequence[int], turn: int = 0) -> Tensor:
        """Photos (B, 3, h, w) on the device: as they are at turn 0, at any other varied in its own way."""
        pixels = torch.from_numpy(photos.take(indices))
        if turn and self.augmentation is not None:
            pixels, _ = self.augmentation(pixels, [(self.config.seed, index, turn) for index in indices])
        return pixels.to(self.device)

    def read(
        self,
        good: str | os.PathLike[str] | Iterable[Any],
        memory_bytes: int,
        skip_bad: bool = False,
        progress: Progress = silent,
    ) -> tuple[Stack, list[Readable]]:
        """All photographs, scaled, and what they are from. Raises `DataError` with a list of the unreadable ones."""
        return read_all(items_of(good), self.preprocessing, memory_bytes, skip_bad, self.workers, progress)
