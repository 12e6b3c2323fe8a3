"""Trained models from their folders."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from kizu.config import build
from kizu.detectors import detector_class
from kizu.detectors.base import Detector
from kizu.errors import ModelError
from kizu.features.safe_load import refuse_not_finite
from kizu.inference import model_folder, model_json

__all__ = ["load"]


def load(folder: str | os.PathLike[str]) -> Detector:
    """Read a model that `save` wrote. Nothing in it is executed. Raises `ModelError` when it is none, or damaged."""
    folder = Path(folder)
    about = model_folder.description(folder)
    if "export" in about:
        raise ModelError(
            f"{folder} is an exported model, which cannot be changed: use the one that it was exported from"
        )
    with model_json.checking(folder, about):
        detector = _restored(folder, about)
    detector.thumbnails = model_folder.thumbnails(folder)
    return detector


def _restored(folder: Path, about: dict[str, Any]) -> Detector:
    try:
        packed = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a kizu model: model.safetensors is missing") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model is damaged ({error})") from None
    refuse_not_finite(packed, str(folder))
    tensors = {key: tensor.clone() for key, tensor in packed.items()}  # aligned: the last bit depends on it
    method = detector_class(about["method"])
    try:
        detector = method(build(method.config_class, about["config"]))
        graph = method.restore_graph(detector.config, tensors)
        graph.load_state_dict(tensors, assign=True)
        detector.graph = graph.eval().requires_grad_(False).to(detector.device)
        detector.restore_thresholds(about)
        detector.grouped = detector.threshold.grouped
        if "files" not in about:  # saved before models had hashes: whether all fits together is tried out
            detector(np.zeros((1, 3, *detector.preprocessing.size), np.uint8))
    except Exception as error:  # of whatever settings and tensors that do not fit lead to
        raise ModelError(f"{folder}: the model is damaged ({type(error).__name__}: {error})") from None
    return detector
