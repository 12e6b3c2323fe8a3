"""A teacher of a few random numbers, for tests of everything around it."""

import os
import tempfile
from pathlib import Path

import torch

from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.networks import PDN

TEACHER = Path(tempfile.gettempdir()) / f"kizu-tests-{os.getpid()}" / "efficientad-s.safetensors"  # while tests run


def tiny(path: Path, size="s") -> Path:
    """Write a teacher with few channels and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PDN(size, 16, (8, 8, 8) if size == "s" else (8, 8, 8, 8))
    teacher.save(path, network, {"made for": "tests"})
    return path
