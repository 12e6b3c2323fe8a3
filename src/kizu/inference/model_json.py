"""model.json: what a model says of itself, with one description of its fields, and the hashes that show damage.

`files` has a hash of each file beside it, and `seal` one of the text itself. They find what a disk, a copy or an editor
did; whoever wants to deceive can make them anew.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kizu.calibration.captures import Captures
from kizu.calibration.threshold import calibrate, from_finite
from kizu.config.zones import LIMITS
from kizu.data import files
from kizu.data.geometry.alignment import reference_in
from kizu.errors import ModelError

__all__ = ["FILE", "FORMAT", "check", "checking", "read", "write"]

FILE = "model.json"
FORMAT = 2
MAX_BYTES = 10**9
NO_SEAL = "0" * 32
_Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Hashes = dict[Annotated[str, Field(pattern=r"^[^/\\]+$")], str]  # of files, by their names


class _Saved(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Threshold(_Saved):
    value: float | None  # None: there is none, and nothing is stopped
    rate: float = Field(gt=0, lt=1)
    count: int = Field(ge=0)
    tuned: str
    grouped: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.value is None and self.count:
            raise ValueError("there is none, though good images set one")
        return self


class _Map(_Saved):
    level: float | None  # the pixel threshold
    scale: list[float] = Field(min_length=2, max_length=2)
    peaks: list[float]


class _Suspect(_Saved):
    number: int
    name: str
    score: float


class _Training(_Open):
    images: int = Field(ge=0)
    names: list[str]
    digests: list[str]
    copies: list[str] = []
    shapes: list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]] = []
    suspects: list[_Suspect]
    hash: str

    @model_validator(mode="after")
    def _names_are_complete(self) -> Self:
        if len(self.names) != self.images:
            raise ValueError(f"{len(self.names)} names of {self.images} images")
        return self


class _Config(_Open):
    size: list[Annotated[int, Field(ge=8, le=65536)]] = Field(min_length=2, max_length=2)
    resize: int | None = Field(ge=8, le=65536)
    align: bool = False
    cannot_judge: Literal["ask", "stop", "pass"] | None = None
    min_area: float | None = None
    min_length: float | None = None
    max_count: int | None = None
    zones: list[dict[str, Any]] = []
    tile: list[Annotated[int, Field(ge=32, le=16384)]] | None = Field(None, min_length=2, max_length=2)
    overlap: int = Field(32, ge=0, le=4096)

    @property
    def rules_sizes(self) -> bool:
        return any(settings.get(name) is not None for settings in (vars(self), *self.zones) for name in LIMITS)


class _Alignment(_Saved):
    reference: str  # a picture
    degrees: _Pair  # the middle of what is looked among, and how far either way
    right: _Pair
    down: _Pair

    @model_validator(mode="after")
    def _can_be_used(self) -> Self:
        reference_in(self.reference)
        if min(self.degrees[1], self.right[1], self.down[1]) < 0:
            raise ValueError("poses are looked for no less than 0 either way")
        return self


class _Captures(_Saved):
    ranges: dict[str, Annotated[list[float | None], Field(min_length=2, max_length=2)]]  # None: without an end
    views: str  # a picture
    lights: list[list[float]]

    @model_validator(mode="after")
    def _can_be_used(self) -> Self:
        Captures.from_json(self.model_dump())
        return self


class _Frame(_Saved):
    frame: tuple[Annotated[int, Field(ge=1, le=10**7)], Annotated[int, Field(ge=1, le=10**7)]] = Field(strict=False)


class _Sizes(_Frame):
    typical: float
    lowest: float


class _Zones(_Frame):
    typical: list[float] = []
    unit: list[float] = []
    level: float | None = None


class _Tolerance(_Saved):
    score: float
    map: float
    place: int


class _Compared(_Saved):
    cases: int
    score: float
    map: float
    place: float
    verdicts: int


class _Parity(_Saved):
    photographs: int
    compared: _Compared
    tolerance: _Tolerance


class _Export(_Saved):
    format: str
    precision: str
    opset: int
    providers: list[str]
    outputs: list[str]
    versions: dict[str, str]
    parity: _Parity
    measured: dict[str, float] = {}
    files: Hashes = {}  # in models of version 0.1, whose exports alone had hashes
    seal: str = ""


class _Model(_Saved):
    format: Literal[2]
    method: str = Field(min_length=1)
    config: _Config
    backbone: dict[str, str]
    alignment: _Alignment | None = None
    captures: _Captures | None = None
    threshold: _Threshold
    calibration_scores: list[float]
    map: _Map
    facts: dict[str, Any]
    training: _Training
    versions: dict[str, str]
    export: _Export | None = None
    files: Hashes | None = None
    seal: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.files is None) != (self.seal is None):
            raise ValueError("files and seal come together")
        if self.config.align != (self.alignment is not None):
            raise ValueError("a model that aligns photographs has a reference, and no other has one")
        if (self.config.cannot_judge is None) != (self.captures is None):
            raise ValueError("a model that refuses photographs knows how good ones are taken, and no other does")
        if self.config.tile is not None and len(self.training.shapes) != self.training.images:
            raise ValueError("a model of photographs in tiles knows the height and width of each")
        threshold = self.threshold
        follows = calibrate(self.calibration_scores, threshold.rate)
        zones = _Zones.model_validate(self.facts["zones"]) if "zones" in self.facts else None
        if "sizes" in self.facts:
            _Sizes.model_validate(self.facts["sizes"])
        if self.config.rules_sizes and "sizes" not in self.facts:
            raise ValueError("a model with rules for sizes knows the photographs that they are of")
        if self.config.rules_sizes and self.map.level != self.threshold.value:
            raise ValueError("with rules for sizes, the pixel threshold is the threshold")
        if not isinstance(self.facts.get("bits", 16), int) or not 8 <= self.facts.get("bits", 16) <= 16:
            raise ValueError("photographs have 8 to 16 bits")
        level = None if zones is None else zones.level  # of zones with promises of their own: no lower than follows
        value = follows.value if level is None else max(follows.value, level)
        if not threshold.tuned and (from_finite(threshold.value), threshold.count) != (value, follows.count):
            raise ValueError("the threshold does not follow from the scores that set it")
        return self


def read(folder: Path) -> dict[str, Any]:
    """What a folder's model.json says. Raises `ModelError` where it is missing, damaged or of another version."""
    try:
        files.check_regular(folder / FILE, MAX_BYTES)
        text = (folder / FILE).read_bytes()
        about: dict[str, Any] = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{folder} is not a kizu model: model.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder}: the model is damaged ({str(error) or type(error).__name__})") from None
    if isinstance(about, dict) and about.get("format", FORMAT) != FORMAT:
        raise ModelError(
            f"{folder}: written by another version of kizu, which can read it (format {about['format']}, not {FORMAT})"
        )
    try:
        _Model.model_validate(about)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ": ".join(map(str, ("model.json", *problem["loc"])))
        raise ModelError(f"{folder}: the model is damaged ({place}: {problem['msg']})") from None
    except RecursionError:
        raise ModelError(f"{folder}: the model is damaged (model.json is nested too deeply)") from None
    if about.get("seal") is not None and about["seal"] != _seal(text, about["seal"]):
        raise ModelError(f"{folder}: model.json is damaged or was changed{_way_out(about)}")
    if (export := about.get("export", {})).get("seal") and export["seal"] != _seal_of_0_1(about):
        raise ModelError(f"{folder}: model.json was changed. Export the model again")
    return about


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write model.json into a folder that holds all other files of the model already."""
    hashes = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    text = files.json_text({**about, "files": hashes, "seal": NO_SEAL}) + "\n"
    (folder / FILE).write_bytes(_sealed(text.encode(), NO_SEAL, _hash(text.encode())))


@contextmanager
def checking(folder: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Compare a model's files with their hashes, in threads, while something else is done with them.

    Raises `ModelError` at the end where one is missing, damaged or was changed.
    """
    expected = about.get("files") or about.get("export", {}).get("files") or {}
    with ThreadPoolExecutor(2, "hash") as threads:
        found = {name: threads.submit(_digest, folder / name) for name in expected}
        yield
        for name, future in found.items():
            if future.result() != expected[name]:
                raise ModelError(f"{folder}: {name} is damaged or was changed{_way_out(about)}")


def check(folder: Path) -> bool:
    """Compare model.json and all files with their hashes; False for a model of version 0.1, which has none."""
    about = read(folder)
    with checking(folder, about):
        return bool(about.get("files") or about.get("export", {}).get("files"))


def _way_out(about: Mapping[str, Any]) -> str:
    if "export" in about:
        return ". Export the model again"
    return ": take a copy that is whole, or train the model again"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _seal(text: bytes, seal: str) -> str:
    """The seal that a text with this one should have."""
    return _hash(_sealed(text, seal, NO_SEAL))


def _sealed(text: bytes, old: str, new: str) -> bytes:
    return text.replace(b'"seal": "%s"' % old.encode(errors="replace"), b'"seal": "%s"' % new.encode(), 1)


def _seal_of_0_1(about: Mapping[str, Any]) -> str:
    export = {key: value for key, value in about["export"].items() if key != "seal"}
    return _hash(json.dumps({**about, "export": export}, sort_keys=True).encode())
