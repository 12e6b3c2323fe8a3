"""Good photographs changed in steps as a camera could change them, and how many are stopped at each step."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from kizu.calibration.threshold import CONFIDENCE, interval, upper
from kizu.data.image import WHITE
from kizu.data.progress import Progress, silent
from kizu.errors import BadImage

if TYPE_CHECKING:
    from kizu.data.preprocessing import Readable
    from kizu.inference.inspector import Inspector

__all__ = ["CORRUPTIONS", "MIN_PHOTOS", "Corruption", "Outcome", "check_robustness", "first_broken"]

GAMMA = 2.2  # of the photographs' values: light is added and scaled in front of it
DAYLIGHT = 6500.0  # kelvin
WAVELENGTHS = (610e-9, 550e-9, 465e-9)  # metres: of red, green and blue filters
PLANCK = 1.4388e-2  # metre · kelvin: h c / k

RGB = npt.NDArray[np.uint8]  # (H, W, 3)
Change = Callable[[RGB, float, np.random.Generator], RGB]


@dataclass(frozen=True)
class Corruption:
    """One way in which photographs change, in growing steps."""

    name: str
    step_format: str  # a step, in words
    steps: tuple[float, ...]
    apply: Change

    def label(self, step: float) -> str:
        return self.step_format.format(abs(step))


MIN_PHOTOS = 20  # fewer hardly ever show that a promise is broken


@dataclass(frozen=True)
class Outcome:
    """What a step does to good photographs at the fixed threshold."""

    corruption: str
    step: str
    stopped: int
    total: int  # of those that can be judged
    promised: float
    refused: int = 0  # that cannot

    @property
    def rate(self) -> float:
        return self.stopped / max(1, self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the rate in the long run lies, with 95 % confidence."""
        return interval(self.stopped, self.total)

    @property
    def verdict(self) -> str:
        """ "broken": more than promised with 95 % confidence; "in doubt": more in this sample; or "holds".

        Fewer than `MIN_PHOTOS` say no more than "not refuted", and none that can be judged "cannot judge".
        """
        if not self.total:
            return "cannot judge"
        good = "holds" if self.total >= MIN_PHOTOS else "not refuted"
        lowest = 1 - upper(self.total - self.stopped, self.total, CONFIDENCE)
        return "broken" if lowest > self.promised else "in doubt" if self.rate > self.promised else good


@dataclass(frozen=True)
class _CorruptedPhoto:
    """A photograph that is changed when it is read."""

    item: "Readable"
    change: Change
    step: float
    seed: tuple[int, ...]

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = WHITE, *, large: bool = False
    ) -> tuple[RGB, tuple[int, int]]:
        rgb, shape = self.item.read(at_least, white, large=True) if large else self.item.read(at_least, white)
        return self.change(rgb, self.step, np.random.default_rng(self.seed)), shape


def check_robustness(
    detector: "Inspector",
    items: "Sequence[Readable]",
    corruptions: "Sequence[Corruption] | None" = None,
    progress: Progress = silent,
) -> Iterator[Outcome]:
    """False alarms among good photographs as they are, then at every step of every corruption.

    Raises `BadImage` for one that cannot be read. What is random follows from the number of the photograph.
    """
    promised = detector.threshold.promised(detector.calibration_scores)
    corruptions = CORRUPTIONS if corruptions is None else corruptions
    total, done = 1 + sum(len(corruption.steps) for corruption in corruptions), 0
    as_it_is = Corruption("as they are", "", (0.0,), lambda rgb, step, rng: rgb)
    for number, corruption in enumerate((as_it_is, *corruptions)):
        for step in corruption.steps:
            changed = [
                _CorruptedPhoto(item, corruption.apply, step, (number, place)) for place, item in enumerate(items)
            ]
            stopped = refused = 0
            for _, outcome in detector.judge(changed):
                if isinstance(outcome, BadImage):
                    raise outcome
                stopped += outcome.is_anomalous and not outcome.cannot_judge
                refused += bool(outcome.cannot_judge)
            done += 1
            progress("Checking", done, total)
            label = corruption.label(step) if number else ""
            yield Outcome(corruption.name, label, stopped, len(items) - refused, promised, refused)


def first_broken(outcomes: Sequence[Outcome]) -> dict[str, Outcome | None]:
    """For each corruption, the first step at which the promise is broken, or None."""
    broken: dict[str, Outcome | None] = {}
    for outcome in outcomes:
        broken.setdefault(outcome.corruption, None)
        if broken[outcome.corruption] is None and outcome.verdict == "broken":
            broken[outcome.corruption] = outcome
    return broken


def brightness(rgb: RGB, per_cent: float, rng: np.random.Generator) -> RGB:
    """More or less light: a longer or shorter exposure."""
    return _scaled(rgb, (1 + per_cent / 100,) * 3)


def contrast(rgb: RGB, per_cent: float, rng: np.random.Generator) -> RGB:
    """Values farther from, or nearer to, the photograph's mean."""
    mean = rgb.mean()
    return _as_rgb(mean + (rgb - mean) * (1 + per_cent / 100))


def colour_temperature(rgb: RGB, kelvin: float, rng: np.random.Generator) -> RGB:
    """Black-body light of another temperature than daylight's 6,500 K, green unchanged (Planck's law)."""
    gains = [
        math.expm1(PLANCK / (length * DAYLIGHT)) / math.expm1(PLANCK / (length * (DAYLIGHT + kelvin)))
        for length in WAVELENGTHS
    ]
    return _scaled(rgb, [gain / gains[1] for gain in gains])


def blur(rgb: RGB, thousandths: float, rng: np.random.Generator) -> RGB:
    """Out of focus: a Gaussian, σ in thousandths of the shorter side."""
    sigma = thousandths / 1000 * min(rgb.shape[:2])
    return _as_rgb(ndimage.gaussian_filter(rgb.astype(np.float32), (sigma, sigma, 0), mode="nearest"))


def noise(rgb: RGB, levels: float, rng: np.random.Generator) -> RGB:
    """Sensor noise of a standard deviation in grey levels, in each pixel and channel."""
    return _as_rgb(rgb + levels * rng.standard_normal(rgb.shape, dtype=np.float32))


def jpeg(rgb: RGB, quality: float, rng: np.random.Generator) -> RGB:
    """Compressed and decoded again."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


def translation(rgb: RGB, per_cent: float, rng: np.random.Generator) -> RGB:
    """Moved by a share of the shorter side, in a random direction."""
    angle, distance = 2 * math.pi * rng.random(), per_cent / 100 * min(rgb.shape[:2])
    return _moved(rgb, distance * math.cos(angle), distance * math.sin(angle), 0.0, 1.0)


def rotation(rgb: RGB, degrees: float, rng: np.random.Generator) -> RGB:
    """Turned about the centre, either way."""
    return _moved(rgb, 0, 0, degrees if rng.random() < 0.5 else -degrees, 1.0)


def scale(rgb: RGB, per_cent: float, rng: np.random.Generator) -> RGB:
    """The camera nearer or farther: the part larger or smaller by so many per cent."""
    return _moved(rgb, 0, 0, 0.0, 1 + per_cent / 100)


CORRUPTIONS = (
    Corruption("less light", "{:g} %", (-5, -10, -20, -30, -40), brightness),
    Corruption("more light", "{:g} %", (5, 10, 20, 30, 40), brightness),
    Corruption("less contrast", "{:g} %", (-5, -10, -20, -30, -40), contrast),
    Corruption("more contrast", "{:g} %", (5, 10, 20, 30, 40), contrast),
    Corruption("warmer light", "{:g} K", (-300, -600, -1000, -1500, -2000), colour_temperature),
    Corruption("cooler light", "{:g} K", (400, 800, 1500, 2500, 4000), colour_temperature),
    Corruption("blur", "σ {:g} ‰ of the side", (1, 2, 3, 5, 8), blur),
    Corruption("sensor noise", "{:g} levels", (2, 4, 8, 12, 20), noise),
    Corruption("JPEG", "quality {:g}", (90, 75, 50, 30, 15), jpeg),
    Corruption("shift", "{:g} %", (1, 2, 3, 5, 8), translation),
    Corruption("rotation", "{:g}°", (1, 2, 3, 5, 10), rotation),
    Corruption("camera nearer", "{:g} %", (1, 2, 5, 10, 15), scale),
    Corruption("camera farther", "{:g} %", (-1, -2, -5, -10, -15), scale),
)


def _scaled(rgb: RGB, gains: Sequence[float]) -> RGB:
    """Light of each channel times a gain."""
    return _as_rgb(rgb * np.array([gain ** (1 / GAMMA) for gain in gains], np.float32))


def _moved(rgb: RGB, right: float, down: float, degrees: float, factor: float) -> RGB:
    """Shifted, turned and scaled about the centre; what comes into view repeats the border."""
    height, width = rgb.shape[:2]
    turn = math.radians(degrees)
    sine, cosine = math.sin(turn) / factor, math.cos(turn) / factor
    matrix = np.array([[cosine, sine], [-sine, cosine]])  # from the result's (y, x) to the photograph's
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = centre - matrix @ (centre + np.array([down, right]))
    planes = [
        ndimage.affine_transform(rgb[..., c].astype(np.float32), matrix, offset, order=1, mode="nearest")
        for c in range(3)
    ]
    return _as_rgb(np.stack(planes, axis=2))


def _as_rgb(values: npt.NDArray[Any]) -> RGB:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)
