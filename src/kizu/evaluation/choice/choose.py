"""Settings chosen for parts that nobody tuned for, from photographs of good ones alone.

From the given settings on, one thing is changed at a time, and kept where it finds clearly more of the made-up defects.
What may be chance, among so few photographs, is left as it was. Kept unless it finds clearly less is one pose for all,
where good parts are much more alike in it; copies in any pose, where parts that are turned look as usual as they were;
and what sees more, wider and at two sizes.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kizu.calibration.threshold import one_in, percent, refuse
from kizu.config import Augmented, BackboneConfig, Config, PatchCoreConfig, build
from kizu.data.progress import Progress, silent
from kizu.detectors.patchcore.detector import PatchCore
from kizu.detectors.stack import items_of
from kizu.errors import OptionError
from kizu.evaluation.choice.candidates import (
    LARGER,
    SMALLER,
    at_two_sizes,
    in_any_pose,
    in_one_pose,
    in_proportion,
    other_size,
    seen_wider,
)
from kizu.evaluation.choice.trials import Material, Trial, gain, run_trial, strange_when_turned, unlikeness_left

__all__ = ["Choice", "choose", "words"]

Settings = dict[str, Any]
SURE = 2.0  # standard errors by which a change must be better
ALIKE = 0.5  # of what good photographs differ in, that may be left in one pose, as `unlikeness_left` says it
USUAL, STRANGE = 0.65, 0.9  # of good parts that are turned, as `strange_when_turned` says it
WORTH = 0.03  # of what there is to be found, that a change must find besides
UNIT = 320 * 320  # pixels of a photograph, for counting the work
MAX_UNITS = 3.2  # of a photograph, at all its sizes together, where nobody bounded its time
WORK_EACH, MIN_WORK = 10, 1600  # photographs' worth of work for each good one, and at least, for all that is tried


@dataclass(frozen=True)
class Choice:
    """The chosen settings, and all that were tried for them."""

    config: Any
    settings: Settings  # that differ from those that the choice began with
    trials: list[Trial]
    taken: list[int]  # indices of the trials whose changes are among them
    reasons: list[str]  # a sentence for each change that was considered
    photos: int  # of different good parts
    held_out: int  # of these, that were not learned from
    defects: int

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table of what was tried."""
        rate = max(self.config.false_alarms, 1 / (self.photos + 1))  # the lowest that so many can promise
        return [
            {
                "settings": words(trial.settings) or "as they were",
                "made-up defects found": percent(trial.found)
                + ("" if len(trial.defects) == self.defects else " (of half)"),
                f"stopped at {one_in(rate)}": percent(trial.stopped),
                "AUROC": f"{trial.image_auroc:.3f}",
                "ms an image": f"{trial.milliseconds:.0f}",
                "": "taken" if number in self.taken else "",
            }
            for number, trial in enumerate(self.trials)
        ]

    @property
    def sentence(self) -> str:
        """What was chosen, and by what."""
        by = f"by {self.defects} made-up defects on {self.held_out} of the {self.photos} good parts"
        if not self.settings:
            return f"The settings stay as they were: {by}, no change was clearly better."
        if not self.taken:
            return f"{words(self.settings)}, in the photographs' proportions: {by}, no change was clearly better."
        first = percent(self.trials[0].found)
        found = " and ".join(percent(self.trials[number].found) for number in self.taken)
        with_it = "with the change" if len(self.taken) == 1 else "with each of the changes alone (not tried together)"
        return (
            f"Chosen {by}: {words(self.settings)}. {first} of these defects were found before, and {found} {with_it}."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as run.json and the report keep it."""
        config = self.config.model_dump(mode="json", exclude_unset=True)
        return {"sentence": self.sentence, "reasons": self.reasons, "rows": self.rows, "config": config}


def choose(
    good: str | os.PathLike[str] | Iterable[Any],
    config: Config | None = None,
    *,
    minutes: float | None = None,
    milliseconds: float | None = None,
    group_by: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Choice:
    """Settings for a method, chosen from photographs of good parts: a folder, or any that `fit` takes.

    What `config` sets stays as it is. Photographs that belong together (`group_by`, as in `fit`) are not divided. The
    work is bounded by what a few trainings take, and after the first trial by `minutes`, if they are given. With
    `milliseconds` nothing is chosen that needs more for a photograph on this machine, with a memory bank of all
    photographs; without them its input has at most about three times the default's pixels. Without either bound equal
    photographs lead to equal choices. SimpleNet is chosen for by PatchCore, which looks through the same network and
    learns in seconds. Raises `DataError` for fewer than 10 photographs of different parts, and `OptionError` for a
    method without a pretrained network.
    """
    config = config or PatchCoreConfig()
    if not isinstance(config, BackboneConfig):
        raise OptionError("`auto`: settings are chosen for patchcore and simplenet, whose network is pretrained")
    if config.tile is not None:
        raise OptionError("`auto`: settings are chosen for photographs that are seen as a whole, without `tile`")
    progress = progress or silent
    limits = _Limits(milliseconds, None if minutes is None else time.monotonic() + 60 * minutes)
    given = {name: getattr(config, name) for name in config.model_fields_set if name in PatchCoreConfig.model_fields}
    material = Material.of(items_of(good), config.seed, group_by, progress, config.bits)
    if isinstance(config, PatchCoreConfig) and "false_alarms" in config.model_fields_set:
        refuse(config.false_alarms, material.parts)
    course = _Course(build(PatchCoreConfig, given), material, limits, workers, progress)
    course.run(wider=isinstance(config, PatchCoreConfig))
    chosen = {name: value for name, value in course.kept.items() if name in type(config).model_fields}
    return Choice(
        build(type(config), {**config.model_dump(exclude_unset=True), **chosen}),
        chosen,
        course.trials,
        course.taken,
        course.reasons,
        material.parts,
        len(material.held_out),
        len(material.defects),
    )


@dataclass
class _Limits:
    milliseconds: float | None  # for a photograph
    end: float | None  # of the time, on the monotonic clock


class _Course:
    """Trials one after the other, each with one thing changed; changes that help are kept together."""

    def __init__(
        self, config: PatchCoreConfig, material: Material, limits: _Limits, workers: int, progress: Progress
    ) -> None:
        self.config, self.material, self.limits = config, material, limits
        self.workers, self.progress = workers, progress
        self.trials: list[Trial] = []
        self.kept: Settings = {}  # all changes that were taken
        self.taken: list[int] = []
        self.reasons: list[str] = []
        self.work_left = float(max(MIN_WORK, WORK_EACH * material.parts))  # in photographs of `UNIT` pixels
        self.work_done, self.seconds = 0.0, 0.0

    def run(self, *, wider: bool) -> None:
        """Poses first, which are cheap to try at the first size; then what sees more; where it does not, sizes."""
        free = "size" not in self.config.model_fields_set and self.config.resize is None
        size = in_proportion(self.config.size, self.material.shape) if free else self.config.size
        self.kept = {"size": size} if size != self.config.size else {}
        self.against, detector = self._tried(self.kept)
        if not self._consider_one_pose() and (change := in_any_pose(self.config)):
            self._consider_any_pose(change, detector)
        if not (wider and self._consider_wider(size, free)) and free:
            self._consider_sizes(size)

    def _consider_one_pose(self) -> bool:
        """Each photograph turned to one pose first, where good parts are much more alike in it; whether it is kept."""
        if (change := in_one_pose(self.config)) is None:
            return self.config.align
        left = unlikeness_left(self.material)
        if left > ALIKE:
            self.reasons.append(f"{words(change)}: not tried, because good parts are not much more alike in it.")
            return False
        return self._consider(change, favoured="good parts are much more alike in it")

    def _consider_any_pose(self, change: Settings, detector: PatchCore) -> None:
        """Learn from turned copies too, unless good parts look strange when they are turned."""
        strange = strange_when_turned(detector, self.material)
        if strange > STRANGE:
            self.reasons.append(f"{words(change)}: not tried, because good parts look strange when they are turned.")
        else:
            self._consider(change, favoured="good parts look usual when they are turned" if strange < USUAL else "")

    def _consider_wider(self, size: tuple[int, int], free: bool) -> bool:
        """What sees more of the whole part, at two sizes if there is room for them; whether it is kept.

        It is favoured, because fewer made-up defects than real ones are wholes that are wrong, which it sees.
        """
        favoured = "more of the whole part is seen"
        changes = at_two_sizes(self.config, size) if free else None, seen_wider(self.config)
        return any(self._consider(change, favoured=favoured) for change in changes if change)

    def _consider_sizes(self, size: tuple[int, int]) -> None:
        """Larger inputs as long as they help, and a smaller one where the first larger one finds less."""
        larger = other_size(size, LARGER)
        if larger and not self._consider({"size": larger}):
            tried = self.trials[-1]
            smaller = other_size(size, SMALLER)
            if smaller and tried.settings.get("size") == larger and gain(tried, self.against)[0] < 0:
                self._consider({"size": smaller})
            return
        while larger and (larger := other_size(larger, LARGER)) and self._consider({"size": larger}):
            pass

    def _consider(self, change: Settings, *, favoured: str = "") -> bool:
        """Try a change, if there is time; whether it is kept.

        It is, if it clearly finds more, and more than little; a change that is favoured, for the reason given, unless
        it clearly finds less, and more than little less.
        """
        settings = {**self.against.settings, **change}
        if refusal := self._out_of_reach(settings):
            self.reasons.append(f"{words(change)}: not tried, {refusal}.")
            return False

        def hopeless(trial: Trial) -> bool:
            more, error = gain(trial, self.against)
            return not favoured and more + SURE * error < WORTH

        trial, _ = self._tried(settings, hopeless)
        more, error = gain(trial, self.against)
        if self.limits.milliseconds is not None and trial.milliseconds > self.limits.milliseconds:
            verdict = f"not taken, because a photograph takes {trial.milliseconds:.0f} ms"
        elif more < -SURE * error and (not favoured or more < -WORTH):
            verdict = "not taken, because it is less"
        elif not favoured and more < SURE * error:
            verdict = "not taken, because it may be chance"
        elif not favoured and more < WORTH:
            verdict = "not taken, because it is little"
        else:
            verdict = "taken"
            self.kept = self._together(self.kept, change)
            self.taken.append(len(self.trials) - 1)
            if favoured and more < SURE * error:
                verdict = (
                    f"taken: the difference is {'small' if more < -SURE * error else 'perhaps chance'}, and {favoured}"
                )
            if not change.keys() & Augmented.model_fields.keys():
                self.against = trial  # copies take long: what else is tried does without them
        found = f"finds {100 * abs(more):.1f} % {'more' if more >= 0 else 'fewer'} of the made-up defects"
        self.reasons.append(f"{words(change)}: {found} (± {100 * error:.1f}), {verdict}.")
        return verdict.startswith("taken")

    def _tried(
        self, settings: Settings, hopeless: Callable[[Trial], bool] = lambda trial: False
    ) -> tuple[Trial, PatchCore]:
        detector = PatchCore(self._config(settings))
        detector.workers = self.workers
        name = f"Trying {words(settings) or 'the settings'}"

        def progress(stage: str, done: int, total: int) -> None:
            self.progress(name, done, total)

        chosen = self._together(self.kept, settings)
        growth = self._patches(chosen) / self._patches(settings) * self.material.parts / len(self.material.learn)
        rate = self.config.false_alarms
        trial = run_trial(detector, settings, self.material, progress, hopeless, growth=growth, rate=rate)
        self.trials.append(trial)
        work = self._work(settings)
        self.work_left -= work
        self.work_done += work
        self.seconds += trial.seconds
        return trial, detector

    def _together(self, settings: Settings, others: Settings) -> Settings:
        """Two changes as one. Where both keep a smaller share of the patches, it is the share of a share."""
        together = {**settings, **others}
        if "coreset" in settings and "coreset" in others and "rotate_degrees" in settings:
            together["coreset"] = settings["coreset"] * others["coreset"] / self.config.coreset
        return together

    def _patches(self, settings: Settings) -> float:
        """How large the memory bank is, in shares of a photograph's patches for each photograph."""
        return self._copies(settings) * self._config(settings).coreset

    def _config(self, settings: Settings) -> PatchCoreConfig:
        """Of a trial, which is free to promise less, since it learns from a part of the photographs."""
        given = self.config.model_dump(exclude_unset=True, exclude={"false_alarms"})
        return build(PatchCoreConfig, {**given, **settings})

    def _copies(self, settings: Settings) -> int:
        """How many of each photograph are learned from, itself and its copies."""
        config = self._config(settings)
        varied = any(getattr(config, name) for name in Augmented.model_fields)
        return 1 + config.augmented_copies if varied else 1

    def _work(self, settings: Settings) -> float:
        """What a trial takes, in photographs of `UNIT` pixels that go through the network."""
        learned = len(self.material.learn) * self._copies(settings)
        photos = learned + len(self.material.held_out) + len(self.material.defects)
        return photos * self._units(settings)

    def _units(self, settings: Settings) -> float:
        """How many `UNIT` pixels a photograph has, at all sizes together."""
        return sum(look.size[0] * look.size[1] for look in self._config(settings).looks) / UNIT

    def _out_of_reach(self, settings: Settings) -> str:
        """Why settings cannot be tried any more; empty where they can."""
        work = self._work(settings)
        if self.limits.milliseconds is None and self._units(settings) > MAX_UNITS:
            return "because so many pixels are tried only with a bound in milliseconds"
        if work > self.work_left:
            return "it would take too long for so few photographs"
        seconds = work * self.seconds / self.work_done
        if self.limits.end is not None and time.monotonic() + seconds > self.limits.end:
            return f"it would take {seconds:.0f} s, and less time than that is left"
        return ""


def words(settings: Settings) -> str:
    """What settings of a choice do, as in "size 320x320 and 448x448, wider, any pose".

    Wider: larger neighbourhoods and a coarser layer. One pose: each photograph is turned to it first. Any pose: turned
    copies are learned from too.
    """
    parts = []
    if "size" in settings:
        looks = build(PatchCoreConfig, {name: settings[name] for name in ("size", "layers") if name in settings}).looks
        parts.append(
            "size " + " and ".join(f"{height}x{width}" for height, width in sorted(look.size for look in looks))
        )
    parts += ["wider"] if "layers" in settings else []
    parts += ["one pose"] if settings.get("align") else []
    parts += ["any pose"] if "rotate_degrees" in settings else []
    return ", ".join(parts)
