"""SimpleNet in the layout of the published code: `ckpt.pth` with the two networks, `params.pkl` with what they need.

In that code features are not divided by their deviation: the first layer takes that in when a model is written.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kizu.config import SimpleNetConfig, build
from kizu.config import backbone_names as names
from kizu.data import files
from kizu.errors import ModelError
from kizu.features import backbone
from kizu.features.pickles import read_plain, write_plain

if TYPE_CHECKING:
    from kizu.detectors.simplenet.detector import SimpleNetGraph

__all__ = ["CHECKPOINT", "PARAMETERS", "first_layer", "read", "write"]

CHECKPOINT, PARAMETERS = "ckpt.pth", "params.pkl"


def write(folder: str | os.PathLike[str], graph: "SimpleNetGraph", levels: dict[str, Any]) -> Path:
    """Both files, whole or not at all, in a new folder or over a model of the same layout.

    `levels` are plain values for which the published code has no place. Raises `ModelError` for a folder of other
    things.
    """
    folder = Path(folder)
    config = graph.config
    known = {CHECKPOINT, PARAMETERS}
    if folder.exists() and any(path.name not in known for path in folder.iterdir()):
        raise ModelError(f"{folder} exists and holds other things: choose another folder")
    states: dict[str, dict[str, Tensor]] = {
        "discriminator": _plain(graph.discriminator.state_dict()),
        "pre_projection": _plain(graph.projection.state_dict()),
    }
    name, key = first_layer(config)
    states[name][key] = states[name][key] / graph.unit.cpu()
    if not config.pre_proj:
        del states["pre_projection"]
    if config.train_backbone:
        states["backbone"] = _plain(graph.backbone.state_dict())
    with files.new_folder(folder) as temporary:
        torch.save(states, temporary / CHECKPOINT)
        parameters = {
            "backbone.name": names.published(config.backbone),
            "layers_to_extract_from": list(graph.backbone.layers),
            "input_shape": (3, *config.size),
            "pretrain_embed_dimension": config.pretrain_embed_dimension,
            "target_embed_dimension": config.target_embed_dimension,
            "patchsize": config.patchsize,
            "patchstride": 1,
            "config": config.model_dump(mode="json"),
            "levels": levels,
        }
        write_plain(temporary / PARAMETERS, parameters)
    return folder


def read(
    folder: str | os.PathLike[str], own: SimpleNetConfig
) -> tuple[SimpleNetConfig, "SimpleNetGraph", dict[str, Any]]:
    """Config, graph and levels from such a folder.

    The published code writes no `params.pkl`: without it, `own` says what the checkpoint cannot, such as the backbone
    and its layers. Raises `ModelError` for files that are damaged, do not fit together, or would run code.
    """
    from kizu.detectors.simplenet.detector import SimpleNetGraph

    folder = Path(folder)
    path = folder / CHECKPOINT
    states = _states(path)
    parameters = read_plain(folder / PARAMETERS) if (folder / PARAMETERS).exists() else {}
    try:
        config = build(SimpleNetConfig, _settings(states, parameters, own))
        weights = config.weights if own.weights is None else own.weights
        network = backbone.create(config.backbone, config.layers, weights, config.size)
        graph = SimpleNetGraph(config, network)
        with torch.inference_mode():
            features = graph.embed(torch.zeros(1, 3, *config.size, dtype=torch.uint8))
        graph.complete(features.shape[1], (features.shape[2], features.shape[3]))
        graph.discriminator.load_state_dict(states["discriminator"])
        if config.pre_proj:
            graph.projection.load_state_dict(states["pre_projection"])
        if "backbone" in states:
            graph.backbone.load_state_dict(states["backbone"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{path}: does not fit its parameters or the backbone ({str(error)[:300]})") from None
    return config, graph.eval().requires_grad_(False), dict(parameters.get("levels") or {})


def _settings(states: dict[str, Any], parameters: dict[str, Any], own: SimpleNetConfig) -> dict[str, Any]:
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
        settings["backbone"] = names.in_timm(parameters["backbone.name"])
        settings["layers"] = tuple(parameters["layers_to_extract_from"])
        settings["size"] = tuple(parameters["input_shape"])[-2:]
        settings |= {
            key: parameters[key] for key in ("pretrain_embed_dimension", "target_embed_dimension", "patchsize")
        }
    else:
        settings["backbone"] = names.in_timm(settings["backbone"])
    return settings


def _states(path: Path) -> dict[str, Any]:
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        raise ModelError(f"{path}: no checkpoint of plain tensors ({type(error).__name__})") from None
    if not isinstance(states, dict) or "tail.weight" not in states.get("discriminator", {}):
        raise ModelError(f"{path}: holds no discriminator of SimpleNet")
    return states


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in state.items()}


def first_layer(config: SimpleNetConfig) -> tuple[str, str]:
    """The layer that takes the features: its network and the name of its weight."""
    if config.pre_proj:
        return "pre_projection", "layers.0fc.weight"
    return "discriminator", "body.block1.0.weight" if config.dsc_layers > 1 else "tail.weight"
