"""SimpleNet in the layout of the published code: `ckpt.pth` with the two networks, `params.pkl` with what they need.

In that code features are not divided by their deviation: the first layer takes that in when a model is written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizu.config import SimpleNetConfig, backbone_names, build
from kizu.data import files
from kizu.detectors.simplenet.networks import first_layer
from kizu.errors import ModelError
from kizu.features.safe_load import read_plain, write_plain

__all__ = ["CHECKPOINT", "PARAMETERS", "Published", "misfit", "read", "write"]

CHECKPOINT, PARAMETERS = "ckpt.pth", "params.pkl"
States = Mapping[str, Mapping[str, Tensor]]  # of "discriminator", "pre_projection" and "backbone", where there is one


class Published(NamedTuple):
    """What such a folder holds."""

    config: SimpleNetConfig
    states: States
    thresholds: dict[str, Any]  # plain values, for which the published code has no place; may be empty


def write(folder: str | os.PathLike[str], model: Published, layers: list[str], unit: Tensor) -> Path:
    """Both files, whole or not at all, in a new folder or over a model of the same layout.

    `layers` are the backbone's that features come from, `unit` is what they are divided by. Raises `ModelError` for a
    folder of other things.
    """
    folder = Path(folder)
    config = model.config
    if folder.exists() and any(path.name not in (CHECKPOINT, PARAMETERS) for path in folder.iterdir()):
        raise ModelError(f"{folder} exists and holds other things: choose another folder")
    states = {
        network: {key: tensor.detach().cpu() for key, tensor in state.items()}
        for network, state in model.states.items()
    }
    network, key = first_layer(config)
    states[network][key] = states[network][key] / unit.cpu()
    with files.new_folder(folder) as temporary:
        torch.save(states, temporary / CHECKPOINT)
        parameters = {
            "backbone.name": backbone_names.published(config.backbone),
            "layers_to_extract_from": layers,
            "input_shape": (3, *config.size),
            "pretrain_embed_dimension": config.pretrain_embed_dimension,
            "target_embed_dimension": config.target_embed_dimension,
            "patchsize": config.patchsize,
            "patchstride": 1,
            "config": config.model_dump(mode="json"),
            "levels": model.thresholds,
        }
        write_plain(temporary / PARAMETERS, parameters)
    return folder


def read(folder: str | os.PathLike[str], own: SimpleNetConfig) -> Published:
    """What such a folder holds.

    The published code writes no `params.pkl`: without it, `own` says what the checkpoint cannot, such as the backbone
    and its layers. Raises `ModelError` for files that are damaged, do not fit together, or would run code.
    """
    folder = Path(folder)
    states = _states(folder / CHECKPOINT)
    parameters = read_plain(folder / PARAMETERS) if (folder / PARAMETERS).exists() else {}
    try:
        config = build(SimpleNetConfig, _settings(states, parameters, own))
    except (KeyError, TypeError, AttributeError) as error:
        raise misfit(folder, error) from None
    return Published(config, states, dict(parameters.get("levels") or {}))


def misfit(folder: str | os.PathLike[str], error: Exception) -> ModelError:
    """The sentence for a checkpoint that is not what its parameters say."""
    path = Path(folder) / CHECKPOINT
    return ModelError(f"{path}: does not fit its parameters or the backbone ({str(error)[:300]})")


def _settings(states: States, parameters: Mapping[str, Any], own: SimpleNetConfig) -> dict[str, Any]:
    """What the tensors and the parameters say, and `own` where they say nothing."""
    if "config" in parameters:
        return dict(parameters["config"])
    settings = own.model_dump()
    discriminator, projection = states["discriminator"], states.get("pre_projection", {})
    settings |= {
        "dsc_layers": 1 + sum(key.endswith(".0.weight") for key in discriminator),
        "dsc_hidden": discriminator["tail.weight"].shape[1],
        "pre_proj": sum(key.endswith("fc.weight") for key in projection),
        "auto_noise": False,
    }
    if "backbone.name" in parameters:
        settings["backbone"] = backbone_names.in_timm(parameters["backbone.name"])
        settings["layers"] = tuple(parameters["layers_to_extract_from"])
        settings["size"] = tuple(parameters["input_shape"])[-2:]
        settings |= {
            key: parameters[key] for key in ("pretrain_embed_dimension", "target_embed_dimension", "patchsize")
        }
    else:
        settings["backbone"] = backbone_names.in_timm(settings["backbone"])
    return settings


def _states(path: Path) -> dict[str, dict[str, Tensor]]:
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        raise ModelError(f"{path}: no checkpoint of plain tensors ({type(error).__name__})") from None
    if not isinstance(states, dict) or "tail.weight" not in states.get("discriminator", {}):
        raise ModelError(f"{path}: holds no discriminator of SimpleNet")
    return states
