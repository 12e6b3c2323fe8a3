"""One pose for all photographs: how far a part is turned and shifted, found from the photograph itself.

Everything is numpy and Pillow, so that a model aligns alike while it is trained, exported and served.
"""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from kizu.data import image
from kizu.data.image import RGB, Float
from kizu.errors import BadImage

__all__ = ["Alignment", "Pose", "Range", "laid_back", "moved", "reference_in", "turned", "within"]

COARSE, FINE = 48, 96  # pixels of the shorter side, for the search and for what refines it
MARGIN = 0.25  # shares of the shorter side around the middle square: how far a part may be shifted
STEP = 5  # degrees, of the search
CANDIDATES, APART = 3, 20  # places of the search that are refined, and the degrees between them
FIRST_ROUNDS, LAST_ROUNDS = 2, 12  # of refining each, and the best
MAX_TURN, MAX_SHIFT = 0.1, 4.0  # radians and pixels of one round
STILL_TURN, STILL_SHIFT = 1e-3, 0.03  # below which a round ends the refining
MOST_MIRRORED = 2  # times a side, beyond either border; what lies further outside is black
LONG = 4  # times the shorter side: of a longer photograph, the middle is looked at
NEARLY_ALL, WIDER, MORE_DEGREES, MORE_SHIFT = 0.95, 1.5, 2.0, 0.02  # quantile, factor, and additions for a `Range`
DENSE = 1.5  # times the input's size, above which a photograph is scaled down before it is turned

Matrix = npt.NDArray[np.float64]  # (2, 3): places (x, y, 1) of the outcome → places of what it is made from


@dataclass(frozen=True)
class Pose:
    """How a part lies in a photograph, against the reference."""

    degrees: float  # it is turned, clockwise
    shift: tuple[float, float]  # right and down, in shares of the photograph's shorter side
    likeness: float  # correlation with the reference once it is turned and shifted, from -1 to 1


@dataclass(frozen=True)
class Range:
    """What good parts are turned and shifted by, and a little more.

    A part that lies in no such way is not put right: that it lies so may be its defect. Each is the middle, and how
    far it may be off either way.
    """

    degrees: tuple[float, float] = (0.0, 180.0)
    right: tuple[float, float] = (0.0, MARGIN)  # shares of the shorter side
    down: tuple[float, float] = (0.0, MARGIN)

    @classmethod
    def of(cls, poses: Sequence[Pose]) -> "Range":
        """Nearly all of these poses lie in it."""
        angles = np.radians([pose.degrees for pose in poses])
        middle = math.degrees(math.atan2(np.sin(angles).mean(), np.cos(angles).mean()))
        off = [abs(_turn_to(pose.degrees, middle)) for pose in poses]
        degrees = middle, min(180.0, WIDER * float(np.quantile(off, NEARLY_ALL)) + MORE_DEGREES)
        right, down = (_around([pose.shift[axis] for pose in poses]) for axis in (0, 1))
        return cls(degrees, right, down)

    def nearest(self, degrees: float, right: float, down: float) -> tuple[float, float, float]:
        """The turn and shift within the range that are nearest to these."""
        middle, most = self.degrees
        if most < 180:
            degrees = middle + float(np.clip(_turn_to(degrees, middle), -most, most))
        x, y = (float(np.clip(at, a - b, a + b)) for at, (a, b) in ((right, self.right), (down, self.down)))
        return degrees, x, y


class Alignment:
    """A reference, and the search for the pose that makes a photograph most like it, among those that good parts have.

    The search is exhaustive: the reference, turned by every fifth degree, at every shift, by the fast Fourier
    transform; the best few are refined by Gauss-Newton steps on the correlation within the largest disc (Evangelidis
    and Psarakis, 2008, in the inverse form of Baker and Matthews, 2004).
    """

    def __init__(self, reference: RGB, poses: Range | None = None) -> None:
        """From a reference picture, the mean of aligned good photographs (144, 144, 3), and the poses to look among."""
        self.reference, self.range = reference, poses or Range()
        values = np.ascontiguousarray(reference.transpose(2, 0, 1), np.float32)
        self._set_search(_coarse(values))
        self._set_refining(values)

    @classmethod
    def learned(cls, photos: Iterable[RGB]) -> tuple["Alignment", list[Pose]]:
        """From photographs of good parts, and the poses of these.

        They are aligned to the first one, and the three quarters that are most like it averaged; then to this mean, and
        the nine tenths that are most like it averaged, which is the reference.
        """
        looks = [_look(photo, FINE) for photo in photos]
        alignment: Alignment = cls(_picture(looks[0]))
        for unlike in (25, 10):  # percent of the photographs that do not enter the mean
            poses = [alignment._pose(look) for look in looks]
            least = np.percentile([pose.likeness for pose in poses], unlike)
            square = (FINE, FINE)
            aligned = [
                _warped(look, _matrix(pose, square, square, look.shape[1:]), look.shape[1:])
                for look, pose in zip(looks, poses, strict=True)
                if pose.likeness >= least
            ]
            alignment = cls(_picture(np.mean(aligned, axis=0)))
        alignment = cls(alignment.reference, Range.of([alignment._pose(look) for look in looks]))
        return alignment, [alignment._pose(look) for look in looks]

    @classmethod
    def of_mean(cls, photos: Sequence[RGB]) -> Self:
        """To the mean of photographs as they are."""
        return cls(_picture(np.mean([_look(photo, FINE) for photo in photos], axis=0)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave. Raises `ValueError` for a reference that is no such picture."""
        ranges = {name: (values[name][0], values[name][1]) for name in ("degrees", "right", "down")}
        return cls(reference_in(values["reference"]), Range(**ranges))

    def to_json(self) -> dict[str, Any]:
        """For a model's JSON: the reference as a picture without loss, and the range of poses."""
        ranges = {name: list(values) for name, values in asdict(self.range).items()}
        return {"reference": base64.b64encode(image.encode(self.reference)).decode(), **ranges}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alignment):
            return NotImplemented
        return self.range == other.range and np.array_equal(self.reference, other.reference)

    def __hash__(self) -> int:
        return hash(self.reference.tobytes())

    def pose(self, photo: RGB) -> Pose:
        """How the part of a photograph (H, W, 3) lies."""
        return self._pose(_look(photo, FINE))

    def likeness(self, photo: RGB) -> float:
        """The correlation of a photograph with the reference as it is, from -1 to 1."""
        seen, _ = _normalised(_middle(_look(photo, FINE))[:, self._within])
        return float(seen.ravel() @ self._template)

    def _pose(self, look: Float) -> Pose:
        found = [self._refined(look, *place, FIRST_ROUNDS) for place in self._search(look)]
        best = max(found, key=lambda place: place[-1])
        angle, x, y, likeness = self._refined(look, *best[:3], LAST_ROUNDS)
        degrees = (math.degrees(angle) + 180) % 360 - 180
        shift = round(float(x) / FINE, 5), round(float(y) / FINE, 5)
        return Pose(round(degrees, 3), shift, round(likeness, 4))

    # The search

    def _set_search(self, reference: Float) -> None:
        side = reference.shape[1]
        disc = _disc(side, COARSE / 2 - 0.5)
        self._disc = np.conj(np.fft.rfft2(disc.astype(np.float32)))
        self._count = int(disc.sum())
        templates, energies = [], []
        for degrees in range(0, 360, STEP):
            template = _warped(reference, _about_middle(math.radians(-degrees), 0, 0, side), (side, side))
            template = (template - template[:, disc].mean(1)[:, None, None]) * disc
            energies.append(float(np.square(template).sum()))
            templates.append(np.conj(np.fft.rfft2(template)))
        self._templates = np.stack(templates).astype(np.complex64)  # (angles, 3, side, side // 2 + 1)
        self._energies = np.array(energies, np.float32)
        shifts = np.r_[0 : round(COARSE * MARGIN) + 1, -round(COARSE * MARGIN) : 0]
        self._columns = shifts[_possible(shifts / COARSE - self.range.right[0], self.range.right[1])]
        self._rows = shifts[_possible(shifts / COARSE - self.range.down[0], self.range.down[1])]
        off = np.array([_turn_to(degrees, self.range.degrees[0]) for degrees in range(0, 360, STEP)])
        self._possible_angles = _possible(off, self.range.degrees[1])

    def _search(self, look: Float) -> list[tuple[float, float, float]]:
        """The best angles in radians, each with its shift (x, y) in pixels of the finer look."""
        small, side = _coarse(look), _side(COARSE)
        spectrum = np.fft.rfft2(small).astype(np.complex64)
        squares = np.fft.rfft2(np.square(small).sum(0))
        products = np.fft.irfft2((self._templates * spectrum).sum(1), s=(side, side))
        sums = np.fft.irfft2(spectrum * self._disc, s=(side, side))
        energies = np.fft.irfft2(squares * self._disc, s=(side, side))
        spread = np.maximum(energies - np.square(sums).sum(0) / self._count, 1e-3 * max(float(energies.max()), 1e-6))
        likeness = products / np.sqrt(spread * np.maximum(self._energies, 1e-6)[:, None, None])
        likeness = likeness[:, self._rows][:, :, self._columns].reshape(len(likeness), -1)
        values, places = np.where(self._possible_angles, likeness.max(1), -np.inf), likeness.argmax(1)
        found = []
        for _ in range(CANDIDATES):
            best = int(values.argmax())
            if not np.isfinite(values[best]):
                break
            row, column = divmod(int(places[best]), len(self._columns))
            shift = self._columns[column] * FINE / COARSE, self._rows[row] * FINE / COARSE
            found.append((math.radians(STEP * best), float(shift[0]), float(shift[1])))
            near = np.arange(best - APART // STEP + 1, best + APART // STEP) % len(values)
            values[near] = -np.inf
        return found

    # Refining

    def _set_refining(self, reference: Float) -> None:
        self._within = _disc(FINE, FINE / 2 - 1)
        down, right = (_middle(np.asarray(slope)) for slope in np.gradient(reference, axis=(1, 2)))
        y, x = np.mgrid[:FINE, :FINE] - (FINE - 1) / 2
        steepest = np.stack([down * x - right * y, right, down], axis=-1)[:, self._within]  # by angle, x and y
        template, norm = _normalised(_middle(reference)[:, self._within])
        steepest = ((steepest - steepest.mean(1, keepdims=True)) / norm).reshape(-1, 3)
        self._template = template.ravel()
        steepest -= np.outer(self._template, self._template @ steepest)
        square = steepest.T @ steepest
        self._solve = np.linalg.inv(square + 1e-6 * max(float(np.trace(square)), 1e-6) * np.eye(3)) @ steepest.T

    def _refined(self, look: Float, angle: float, x: float, y: float, rounds: int) -> tuple[float, float, float, float]:
        """Angle and shift in pixels that raise the likeness, and the likeness."""
        best = (angle, x, y, -2.0)
        for _ in range(rounds + 1):
            degrees, right, down = self.range.nearest(math.degrees(angle), x / FINE, y / FINE)
            angle, x, y = math.radians(degrees), right * FINE, down * FINE
            matrix = _about_middle(angle, x, y, look.shape[1])
            matrix[:, 2] += matrix[:, :2].sum(1) * (look.shape[1] - FINE) / 2  # only the middle is looked at
            seen, _ = _normalised(_warped(look, matrix, (FINE, FINE))[:, self._within])
            likeness = float(seen.ravel() @ self._template)
            if likeness > best[-1]:
                best = (angle, x, y, likeness)
            turn, across, along = self._solve @ (seen.ravel() / max(likeness, 0.1) - self._template)
            turn = float(np.clip(turn, -MAX_TURN, MAX_TURN))
            length = math.hypot(across, along)
            slower = min(1.0, MAX_SHIFT / max(length, 1e-9))
            angle -= turn
            x -= slower * (math.cos(angle) * across - math.sin(angle) * along)
            y -= slower * (math.sin(angle) * across + math.cos(angle) * along)
            if abs(turn) < STILL_TURN and length < STILL_SHIFT:
                break
        return best


def reference_in(text: str) -> RGB:
    """The picture in what `Alignment.to_json` gave. Raises `ValueError` for anything else."""
    try:
        reference = image.read(base64.b64decode(text, validate=True))
    except BadImage as error:
        raise ValueError(f"the reference that photographs are aligned to {error.reason}") from None
    if reference.shape != (_side(FINE), _side(FINE), 3):
        raise ValueError(f"the reference that photographs are aligned to is not {_side(FINE)} pixels wide and high")
    return reference


def turned(photo: RGB, pose: Pose, size: tuple[int, int]) -> RGB:
    """A photograph (H, W, 3) in the reference's pose and of `size` (height, width), mirrored beyond its borders."""
    shape = photo.shape[:2]
    dense = round(DENSE * size[0]), round(DENSE * size[1])
    if shape[0] > dense[0] or shape[1] > dense[1]:
        photo = image.resize(photo, (min(shape[0], dense[0]), min(shape[1], dense[1])))
    scale = np.array([photo.shape[1] / size[1], photo.shape[0] / size[0]])[:, None]
    matrix = scale * _matrix(pose, shape, size, size)
    corners = matrix @ [[0, size[1], 0, size[1]], [0, 0, size[0], size[0]], [1, 1, 1, 1]]
    beyond = np.concatenate([-corners.min(1)[::-1], corners.max(1)[::-1] - photo.shape[:2]])
    most = MOST_MIRRORED * np.array(photo.shape[:2] * 2)
    top, left, bottom, right = np.clip(np.ceil(beyond) + 2, 0, most).astype(int).tolist()
    padded = np.pad(photo, ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    matrix[:, 2] += left, top
    picture = Image.fromarray(padded)
    coefficients = tuple(matrix.ravel().tolist())
    seen = picture.transform(size[::-1], Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(seen)


def laid_back(values: Float, pose: Pose, shape: tuple[int, int]) -> Float:
    """A map (h, w) over the turned photograph of `shape`, back over the photograph as it was; minimum beyond."""
    height, width = values.shape
    there = np.vstack([_matrix(pose, shape, (height, width), (height, width)), [0, 0, 1]])
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    least = float(values.min())
    back = np.linalg.inv(there)[:2]
    return np.asarray(picture.transform((width, height), Image.Transform.AFFINE, *_data(back), fillcolor=least))


def moved(place: tuple[float, float], pose: Pose, shape: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Where a place (x, y) of a photograph of `shape`, scaled to `size`, lies in the turned one."""
    there = np.vstack([_matrix(pose, shape, size, size), [0, 0, 1]])
    x, y, _ = np.linalg.inv(there) @ [*place, 1]
    return float(x), float(y)


def within(pose: Pose, shape: Sequence[int], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(height, width): which places of a turned photograph of `shape`, scaled to `size`, lie within the photograph."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    across, down = _matrix(pose, shape, size, size) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    inside = (across >= 0) & (across <= size[1]) & (down >= 0) & (down <= size[0])
    return np.asarray(inside.reshape(size))


def _matrix(pose: Pose, shape: Sequence[int], size: Sequence[int], canvas: Sequence[int]) -> Matrix:
    """Places of the turned picture → places of the photograph of `shape`, both scaled to `size`, amid a `canvas`."""
    shorter = min(shape[:2])
    scale = np.array([size[1] / shape[1], size[0] / shape[0]]) * shorter  # pixels of a shorter side, across and down
    angle = math.radians(pose.degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = turn * scale[:, None] / scale
    middle = np.array([canvas[1], canvas[0]]) / 2
    return np.column_stack([turn, middle + scale * pose.shift - turn @ middle])


def _about_middle(angle: float, x: float, y: float, side: int) -> Matrix:
    """As `_matrix`, of a square picture, in radians and pixels."""
    pose = Pose(math.degrees(angle), (x / side, y / side), 0)
    return _matrix(pose, (side, side), (side, side), (side, side))


def _data(matrix: Matrix) -> tuple[tuple[float, ...], Image.Resampling]:
    return tuple(matrix.ravel().tolist()), Image.Resampling.BILINEAR


def _warped(layers: Float, matrix: Matrix, size: Sequence[int]) -> Float:
    """Layers (C, H, W) seen through a matrix, (C, height, width)."""
    pictures = [Image.fromarray(layer) for layer in layers]
    seen = [picture.transform((size[1], size[0]), Image.Transform.AFFINE, *_data(matrix)) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in seen])


def _look(photo: RGB, side: int) -> Float:
    """(3, S, S): a photograph with a shorter side of `side` pixels, amid a square, its borders drawn out to fill it."""
    for axis in (0, 1):
        beyond = max(0, photo.shape[axis] - LONG * photo.shape[1 - axis]) // 2
        photo = photo[(slice(None),) * axis + (slice(beyond, photo.shape[axis] - beyond),)]
    height, width = photo.shape[:2]
    scale = side / min(height, width)
    values = image.resize(photo, (max(side, round(scale * height)), max(side, round(scale * width)))).astype(np.float32)
    for axis in (0, 1):
        missing = _side(side) - values.shape[axis]
        if missing > 0:
            around = [(0, 0), (0, 0), (0, 0)]
            around[axis] = missing // 2, missing - missing // 2
            values = np.pad(values, around, mode="edge")
        else:
            values = np.take(values, np.arange(_side(side)) - missing // 2, axis=axis)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _picture(look: Float) -> RGB:
    return look.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)


def _coarse(look: Float) -> Float:
    side = _side(COARSE)
    return np.stack([image.resize_map(layer, (side, side)) for layer in look])


def _turn_to(degrees: float, middle: float) -> float:
    """From one angle to another, in -180 … 180."""
    return (degrees - middle + 180) % 360 - 180


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The middle of shifts, and how far from it others may be."""
    middle = float(np.median(values))
    off = float(np.quantile(np.abs(np.subtract(values, middle)), NEARLY_ALL))
    return middle, min(MARGIN, WIDER * off + MORE_SHIFT)


def _possible(off: npt.NDArray[np.float64], most: float) -> npt.NDArray[np.bool_]:
    """Which of these steps of the search lie no further off than `most`; at least those that are nearest."""
    distance = np.abs(off)
    return distance <= max(most, float(distance.min()))


def _middle(layers: Float) -> Float:
    margin = (layers.shape[1] - FINE) // 2
    return layers[:, margin : margin + FINE, margin : margin + FINE]


def _side(shorter: int) -> int:
    """Of the square around a photograph."""
    return round(shorter * (1 + 2 * MARGIN))


def _disc(side: int, radius: float) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.asarray(y * y + x * x <= radius * radius)


def _normalised(values: Float) -> tuple[Float, float]:
    """(C, N) with each layer's mean taken off and of length 1 together, and the length before."""
    centred = values - values.mean(1, keepdims=True)
    length = max(float(np.linalg.norm(centred)), 1e-6)
    return centred / length, length
