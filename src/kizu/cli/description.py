"""What a model is, in plain words."""

import json
import math
from pathlib import Path
from typing import Any

from kizu.calibration.sizes import what_matters
from kizu.calibration.threshold import Threshold, one_in
from kizu.config import Config, OtherConfig, build
from kizu.detectors import config_class
from kizu.errors import KizuError, ModelError
from kizu.inference.parity import Difference, Tolerance

__all__ = ["describe_model"]

SAID = ("zones", "sizes")  # facts that have lines of their own


def describe_model(folder: Path) -> dict[str, Any]:
    """What model.json says, as sentences. Raises `ModelError` when it cannot be read."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        threshold, training, config = Threshold.from_json(about["threshold"]), about["training"], about["config"]
        return {
            "model": str(folder),
            "method": about["method"],
            **_exported(about.get("export")),
            "learned from": f"{training['images']} good images (hash {training['hash']})"
            if training["images"]
            else "images that only the published program saw",
            "backbone": f"{about['backbone']['name']} (weights {about['backbone']['weights']})",
            "input": " × ".join(map(str, config["size"])) + " pixels (height × width)",
            **_tiles(about["config"]),
            "threshold": f"a part is stopped when its score is above {threshold.value:.6g}"
            if math.isfinite(threshold.value)
            else "none: nothing is stopped",
            "promise": threshold.statement,
            **_zones(about),
            **_sizes(about),
            "facts": [f"{key}: {_plain(value)}" for key, value in about["facts"].items() if key not in SAID],
            "settings": _settings(about["method"], config),
            "versions": ", ".join(f"{key} {value}" for key, value in about["versions"].items()),
            "size on disk": f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB",
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None


def _settings(method: str, config: dict[str, Any]) -> list[str]:
    """Those that are not the defaults, a line each; where the method's package is missing, its own settings too."""
    try:
        defaults = config_class(method)().model_dump(mode="json")
    except KizuError:
        defaults = Config().model_dump(mode="json")
    chosen = [
        f"{key}: {_plain(value)}" for key, value in config.items() if defaults.get(key, ...) != value and key != "zones"
    ]
    return [*chosen, f"{'all have' if not chosen else 'the others have'} their defaults (model.json lists each)"]


def _sizes(about: dict[str, Any]) -> dict[str, Any]:
    """What is too small to matter, for a model that has such rules."""
    sentence = what_matters(build(OtherConfig, about["config"]))
    return {"sizes": sentence} if sentence else {}


def _tiles(config: dict[str, Any]) -> dict[str, str]:
    """How a model that judges photographs in tiles cuts and sees them."""
    if not config.get("tile"):
        return {}
    height, width = config["tile"]
    share = max(config["size"][0] / height, config["size"][1] / width)
    sides = f"{height} × {width} pixels of the photograph, {config['overlap']} of them in common with the next"
    return {"tiles": f"{sides}, seen at {share:.3g} of its resolution"}


def _zones(about: dict[str, Any]) -> dict[str, Any]:
    """The zones of a model that has some: their names, and the thresholds of several."""
    zones = about["config"].get("zones")
    if not zones:
        return {}
    units = about["facts"]["zones"]
    limits = [
        f": stopped above {typical + about['threshold']['value'] * unit:.4g}"
        for typical, unit in zip(units.get("typical", []), units.get("unit", []), strict=True)
        if about["threshold"]["value"] is not None
    ]
    inspected = [zone for zone in zones if not zone["ignored"]]
    named = [
        zone["name"] + limit + (f", {one_in(rate)} good parts" if (rate := zone.get("false_alarms")) else "")
        for zone, limit in zip(inspected, limits or [""] * len(inspected), strict=True)
    ]
    return {"zones": [*named, *(f"{zone['name']}: ignored" for zone in zones if zone["ignored"])]}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _exported(export: dict[str, Any] | None) -> dict[str, Any]:
    """What there is to say of an exported model, and of no other."""
    if export is None:
        return {}
    difference = Difference(**export["parity"]["compared"])
    measured = [f"{key}: {value}" for key, value in export.get("measured", {}).items()]
    return {
        "exported to": f"{export['format']} in {export['precision']}, gives {', '.join(export['outputs'])}",
        "parity with torch": difference.sentence(Tolerance(**export["parity"]["tolerance"])),
        **({"measured": measured} if measured else {}),
    }
