"""Models in the published layouts, read into detectors and written from them. Nothing in the files is executed.

PatchCore    a folder of [Ensemble-<i>-<n>_]nnscorer_search_index.faiss and …patchcore_params.pkl
SimpleNet    a folder of ckpt.pth and params.pkl (the published code leaves the first one only)
EfficientAD  <size>_size/<data set>/<category>/{student,autoencoder,mu,sigma,quantile}.pt and
             <size>_size/teacher/teacher.pt
"""

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kizu.config import EfficientADConfig, PatchCoreConfig, SimpleNetConfig, backbone_names, build
from kizu.data import files
from kizu.detectors.base import Detector
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.detector import EfficientAD
from kizu.detectors.efficientad.embedded import EmbeddedGraph
from kizu.detectors.efficientad.graph import EfficientADGraph
from kizu.detectors.patchcore.detector import PatchCore
from kizu.detectors.patchcore.graph import EnsembleGraph, PatchCoreGraph
from kizu.detectors.patchcore.memory_bank import Bank
from kizu.detectors.patchcore.nearest import nearest
from kizu.detectors.puad.detector import PUAD
from kizu.detectors.simplenet.detector import SimpleNet
from kizu.detectors.simplenet.published import CHECKPOINT
from kizu.errors import ModelError, OptionError
from kizu.export import faiss_file
from kizu.features import backbone
from kizu.features.safe_load import read_plain, read_tensors, write_plain

__all__ = [
    "check_patchcore",
    "found_models",
    "network_state",
    "read_reference",
    "resized",
    "write_efficientad",
    "write_reference",
]
__all__ += ["write_tensors"]

INDEX, PARAMETERS = "nnscorer_search_index.faiss", "patchcore_params.pkl"
ENSEMBLE = re.compile(r"Ensemble-(\d+)-(\d+)_" + re.escape(INDEX))
UNKNOWN_IMAGE = -1  # the number of the image of a bank entry that is of none of ours
RESIZED = {224: 256, 288: 329, 320: 366}  # size → what the published recipes scale the shorter side to before the cut
MAX_COMPARED = 2000  # bank entries whose neighbours say how far apart entries are
QUANTILES = (("q_a_student", "q_b_student"), ("q_a_autoencoder", "q_b_autoencoder"))
AUTOENCODER = {
    **{f"encoder.{number}": f"encoder.enconv{number + 1}" for number in range(6)},
    **{f"decoder.{number}": f"decoder.deconv{number + 1}" for number in range(7)},
    "output": "decoder.deconv8",
}  # our names → the published ones


def read_reference(
    folder: str | os.PathLike[str],
    *,
    size: int | None = None,
    resize: int | None = None,
    weights: str | None = None,
    neighbours: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Detector:
    """A detector from a model's folder, whichever of the three layouts it has.

    The files do not say what photographs were scaled to before the centre was cut out (`resize`; by default what the
    published recipes take for the `size`), and those of the published SimpleNet do not name the backbone and its layers
    (`settings`, of our config). They hold no backbone: its weights come from timm's hub or from the file `weights`; of
    several, separated by commas. There is no threshold in them: nothing is stopped until `Detector.calibrate` has
    set one. `neighbours` replaces the number in PatchCore's files.

    Raises `ModelError` for files that are missing, damaged, do not fit together, or would run code.
    """
    folder = Path(folder)
    if any(folder.glob(f"*{INDEX}")):
        return _read_patchcore(folder, size, resize, weights, neighbours)
    if (folder / CHECKPOINT).exists():
        given = {
            "top": 0.0,
            "auto_noise": False,
            "weights": weights,
            "size": size,
            "resize": resize,
            **(settings or {}),
        }
        chosen = {key: value for key, value in given.items() if value is not None}
        if "resize" not in chosen and "size" in chosen:
            chosen["resize"] = resized(chosen["size"])
        detector = SimpleNet(build(SimpleNetConfig, chosen)).load_from_path(folder)
        detector.training = detector.training or _unknown_training()
        return detector
    if (folder / "student.pt").exists():
        return _read_efficientad(folder, folder.parents[1] / "teacher" / "teacher.pt")
    raise ModelError(
        f"{folder}: no model of a published layout ({INDEX} and {PARAMETERS}; {CHECKPOINT}; or student.pt, "
        "autoencoder.pt, mu.pt, sigma.pt and quantile.pt)"
    )


def found_models(path: str | os.PathLike[str]) -> list[Path]:
    """The folders below `path`, or `path` itself, that hold a model of a published layout."""
    path = Path(path)
    kinds = (f"*{INDEX}", CHECKPOINT, "student.pt")
    return sorted({file.parent for kind in kinds for file in path.rglob(kind)})


def write_reference(
    detector: Detector, folder: str | os.PathLike[str], *, data_set: str = "dataset", category: str = "category"
) -> Path:
    """Write a detector as its published code does; returns the folder of the model.

    PatchCore's and SimpleNet's files lie in `folder` itself, EfficientAD's in the tree below it, under the names of
    data set and category. A PUAD is fitted anew each time in the published code: of one over EfficientAD, its base is
    written. The published PatchCore squares its distances. Raises `ModelError`, with the options that would make it
    possible, for a detector that computes what the published code cannot.
    """
    if detector.graph is None:
        raise ModelError("There is nothing to write: call fit first.")
    if detector.preprocessing.alignment is not None:
        raise ModelError("The published systems do not align photographs: train without `align=True`.")
    if detector.preprocessing.zones is not None:
        raise ModelError("The published systems know no zones: train without `zones`.")
    if detector.preprocessing.tiling is not None:
        raise ModelError("The published systems do not judge in tiles: train without `tile`.")
    folder = Path(folder)
    if isinstance(detector, PatchCore):
        return _write_patchcore(detector, folder)
    if isinstance(detector, SimpleNet):
        return detector.save_to_path(folder)
    graph = detector.graph.base if isinstance(detector, PUAD) else detector.graph
    if isinstance(graph, EfficientADGraph):
        config = detector._base().config if isinstance(detector, PUAD) else detector.config
        return write_efficientad(graph, config, folder, data_set, category)
    if isinstance(graph, EmbeddedGraph):
        raise ModelError("The published EfficientAD has its own networks: train with `network=s` or `network=m`")
    raise ModelError(
        'The published PUAD stands on EfficientAD only: train it with `base="efficientad"` and `exact=True`'
    )


def resized(size: int) -> int:
    """What the published recipes scale a photograph's shorter side to; of other sizes, in the ratio of 224 to 256."""
    return RESIZED.get(size, round(size * 8 / 7))


def write_tensors(path: Path, content: Any) -> None:
    """torch.save, whole or not at all."""
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _read_patchcore(
    folder: Path, size: int | None, resize: int | None, weights: str | None, neighbours: int | None
) -> PatchCore:
    prefixes = _prefixes(folder)
    members = [_parameters(folder / f"{prefix}{PARAMETERS}") for prefix in prefixes]
    first = {key: value for key, value in members[0].items() if key not in ("backbone", "layers")}
    if any({**first, **member} != {**member, **first} for member in members):
        raise ModelError(f"{folder}: the members of the ensemble differ in more than backbone and layers")
    side = size or first["size"]
    prefixed = [[f"{n}." * (len(members) > 1) + layer for layer in m["layers"]] for n, m in enumerate(members)]
    settings = {
        **first,
        "backbone": ",".join(member["backbone"] for member in members),
        "layers": tuple(layer for layers in prefixed for layer in layers),
        "weights": weights,
        "neighbours": neighbours or first["neighbours"],
        "size": side,
        "resize": resize or resized(side),
        "fusion": "stack",
        "local_scale": False,
        "top": 0.0,
        "squared": True,
        "sampler": "identity",
        "coreset": 1.0,
    }
    detector = PatchCore(build(PatchCoreConfig, settings))
    graphs = [
        _patchcore_graph(config, folder / f"{prefix}{INDEX}")
        for config, prefix in zip(detector.config.members(), prefixes, strict=True)
    ]
    units = [_mean_neighbour_distance(graph.banks[0].entries) for graph in graphs]
    graph: PatchCoreGraph | EnsembleGraph = graphs[0]
    if len(graphs) > 1:
        graph = EnsembleGraph(graphs)
        graph.score_stats.copy_(torch.tensor([[0.0, unit] for unit in units]))
        graph.map_stats.copy_(graph.score_stats)
    detector.graph = graph.eval().requires_grad_(False).to(detector.device)
    detector.training = _unknown_training()
    detector.facts = {"bank": [len(g.banks[0].entries) for g in graphs], "read from": str(folder)}
    detector.heat_map_range = (0.0, 2.0 if len(graphs) > 1 else 2 * units[0])
    return detector


def _prefixes(folder: Path) -> list[str]:
    """Of the members' files, in their order. Raises `ModelError` where one is missing."""
    if (folder / INDEX).exists():
        return [""]
    matches = {match for path in folder.glob(f"Ensemble-*{INDEX}") if (match := ENSEMBLE.fullmatch(path.name))}
    numbers = sorted((int(match[1]), int(match[2])) for match in matches)
    count = len(numbers)
    if numbers != [(number, count) for number in range(1, count + 1)]:
        listed = ", ".join(f"{number} of {of}" for number, of in numbers)
        raise ModelError(f"{folder}: the ensemble is not complete, there are members {listed or 'of no known name'}")
    return [f"Ensemble-{number}-{of}_" for number, of in numbers]


def _parameters(path: Path) -> dict[str, Any]:
    """The published parameters as settings of ours."""
    published = read_plain(path)
    try:
        shape = [int(side) for side in published["input_shape"]]
        return {
            "backbone": backbone_names.in_timm(backbone_names.without_seed(str(published["backbone.name"]))[0]),
            "layers": tuple(str(layer) for layer in published["layers_to_extract_from"]),
            "size": shape[-1],
            "neighbours": int(published["anomaly_scorer_num_nn"]),
            **{
                key: int(published[key])
                for key in ("pretrain_embed_dimension", "target_embed_dimension", "patchsize", "patchstride")
            },
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: these are not PatchCore's parameters ({type(error).__name__}: {error})") from None


def _patchcore_graph(config: PatchCoreConfig, path: Path) -> PatchCoreGraph:
    entries = torch.from_numpy(faiss_file.read(path))
    graph = PatchCoreGraph(config, backbone.create(config.backbone, config.layers, config.weights, config.size))
    with torch.inference_mode():
        features = graph.embed(torch.zeros(1, 3, *config.size, dtype=torch.uint8))[0]
    if features.shape[1] != entries.shape[1]:
        raise ModelError(
            f"{path}: its vectors have {entries.shape[1]} numbers, and its parameters say {features.shape[1]}"
        )
    numbers = torch.arange(len(entries))
    grid = features.shape[2], features.shape[3]
    graph.set_grids([grid], entries.device, lambda upsample: upsample.inspect(None, None))
    graph.set_banks([Bank.of(entries, torch.full_like(numbers, UNKNOWN_IMAGE), numbers)])
    return graph


@torch.inference_mode()
def _mean_neighbour_distance(entries: Tensor) -> float:
    """The mean squared distance from an entry to the nearest other one."""
    sample = entries[:: max(1, len(entries) // MAX_COMPARED)]
    distances, _ = nearest(sample, entries, 2)
    return max(float(distances[:, -1].square().mean()), 1e-12)


def _write_patchcore(detector: PatchCore, folder: Path) -> Path:
    check_patchcore(detector.config)
    kept = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if any(not name.endswith((INDEX, PARAMETERS)) for name in kept):
        raise ModelError(f"{folder} exists and holds other things: choose another folder")
    graph = detector.graph
    members = list(graph.members) if isinstance(graph, EnsembleGraph) else [graph]
    with files.new_folder(folder) as temporary:
        for number, member in enumerate(members, 1):
            assert isinstance(member, PatchCoreGraph)
            prefix = f"Ensemble-{number}-{len(members)}_" if len(members) > 1 else ""
            bank = member.banks[0]
            order = bank.places.argsort() if bool((bank.images == UNKNOWN_IMAGE).all()) else slice(None)
            write_plain(temporary / f"{prefix}{PARAMETERS}", _published_parameters(member))
            faiss_file.write(temporary / f"{prefix}{INDEX}", bank.entries[order].numpy(force=True))
    return folder


def check_patchcore(config: PatchCoreConfig) -> None:
    """Raise `ModelError` for settings that the published code has no files for."""
    plain = config.fusion == "stack" and not (config.local_scale or config.top or config.patchsize_aggregate)
    if not plain or config.reweight > 1:
        dimensions = ""
        if config.pretrain_embed_dimension is None:
            dimensions = " Where layers differ in channels, as the embedded backbone's do, it also needs "
            dimensions += "`pretrain_embed_dimension=1024` and `target_embed_dimension=1024`."
        raise ModelError(
            "The published PatchCore has one bank of plain distances and scores the worst patch: train with "
            '`fusion="stack"`, `local_scale=False`, `top=0`, without `reweight` and without `patchsize_aggregate`.'
            f"{dimensions}"
        )
    if config.size[0] != config.size[1]:
        raise ModelError(f"The published PatchCore takes square inputs only, not {config.size[0]}x{config.size[1]}")


def _published_parameters(graph: PatchCoreGraph) -> dict[str, Any]:
    config = graph.config
    dimensions = config.pretrain_embed_dimension, config.target_embed_dimension
    if dimensions == (None, None):
        device = graph.banks[0].entries.device
        with torch.inference_mode():
            maps = graph.backbone(torch.zeros(1, 3, *config.size, dtype=torch.uint8, device=device))
        channels = {layer.shape[1] for layer in maps}
        if len(channels) > 1:
            raise ModelError(
                f"The published PatchCore pools all layers to as many channels, and these have {sorted(channels)}: "
                "train with `pretrain_embed_dimension` and `target_embed_dimension`"
            )
        dimensions = channels.pop(), graph.banks[0].entries.shape[1]
    return {
        "backbone.name": backbone_names.published(config.backbone),
        "layers_to_extract_from": list(graph.backbone.layers),
        "input_shape": (3, *config.size),
        "pretrain_embed_dimension": dimensions[0],
        "target_embed_dimension": dimensions[1],
        "patchsize": config.patchsize,
        "patchstride": config.patchstride,
        "anomaly_scorer_num_nn": config.neighbours,
    }


def _read_efficientad(folder: Path, teacher_file: Path) -> EfficientAD:
    if not teacher_file.is_file():
        raise ModelError(f"{teacher_file}: there is no such teacher, and the model in {folder} needs it")
    network = teacher.assemble(read_tensors(teacher_file), str(teacher_file))
    settings = {"teacher": str(teacher_file), "network": network.size, "border": "stretch"}
    detector = EfficientAD(build(EfficientADConfig, settings))
    graph = EfficientADGraph(detector.config, network)
    graph.student = _checked_student(
        teacher.assemble(_tensors(folder, "student"), str(folder / "student.pt")), graph, folder
    )
    autoencoder = _tensors(folder, "autoencoder")
    pairs = ((ours, theirs, part) for ours, theirs in AUTOENCODER.items() for part in ("weight", "bias"))
    try:
        state = {f"{ours}.{part}": autoencoder[f"{theirs}.{part}"].float() for ours, theirs, part in pairs}
        graph.autoencoder.load_state_dict(state)
        graph.mean.copy_(_tensors(folder, "mu")[""].flatten())
        graph.std.copy_(_tensors(folder, "sigma")[""].flatten())
        quantiles = _tensors(folder, "quantile")
        graph.levels.copy_(torch.tensor([[float(quantiles[name]) for name in pair] for pair in QUANTILES]))
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: its files do not fit together ({str(error)[:300]})") from None
    detector.graph = graph.eval().requires_grad_(False).to(detector.device)
    detector.training = _unknown_training()
    detector.facts = {"teacher": {"file": teacher_file.name}, "read from": str(folder)}
    return detector


def _checked_student(student: Any, graph: EfficientADGraph, folder: Path) -> Any:
    if student.size != graph.teacher.size or student.dimension != 2 * graph.teacher.dimension:
        raise ModelError(f"{folder / 'student.pt'}: this student is not of the teacher's size")
    return student


def _unknown_training() -> dict[str, Any]:
    """What is known of the images that another program learned from."""
    return {"images": 0, "hash": "", "names": [], "digests": [], "suspects": []}


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return read_tensors(folder / f"{name}.pt")


def write_efficientad(
    graph: EfficientADGraph, config: EfficientADConfig, models: Path, data_set: str, category: str
) -> Path:
    """Below the folder `models`; returns the category's folder. A teacher that is there already has to be the same."""
    if config.border != "stretch" or config.size != (256, 256) or config.smoothing:
        raise ModelError(
            "The published EfficientAD sees 256 × 256 pixels and stretches its map over them: train with "
            '`border="stretch"`, `size=256` and `smoothing=0`'
        )
    top = models / f"{graph.teacher.size}_size"
    teacher_file = top / "teacher" / "teacher.pt"
    if teacher_file.exists():
        existing = teacher.assemble(read_tensors(teacher_file), str(teacher_file))
        if teacher.fingerprint(existing) != teacher.fingerprint(graph.teacher):
            raise OptionError(f"{teacher_file} is another teacher than this model's: choose another folder")
    else:
        write_tensors(teacher_file, network_state(graph.teacher))
    target = top / data_set / category
    with files.new_folder(target) as temporary:
        state = graph.autoencoder.state_dict()
        pairs = ((ours, theirs, part) for ours, theirs in AUTOENCODER.items() for part in ("weight", "bias"))
        autoencoder = OrderedDict((f"{theirs}.{part}", state[f"{ours}.{part}"].cpu()) for ours, theirs, part in pairs)
        levels = {
            name: graph.levels[row, column].cpu().clone()
            for row, pair in enumerate(QUANTILES)
            for column, name in enumerate(pair)
        }
        contents = (network_state(graph.student), autoencoder, graph.mean.cpu(), graph.std.cpu(), levels)
        for name, content in zip(("student", "autoencoder", "mu", "sigma", "quantile"), contents, strict=True):
            torch.save(content, temporary / f"{name}.pt")
    return target


def network_state(network: Any) -> "OrderedDict[str, Tensor]":
    """A patch description network's under the published names: conv1.weight, conv1.bias, conv2.weight, …"""
    return OrderedDict(
        (f"conv{number}.{part}", getattr(layer, part).detach().cpu())
        for number, layer in enumerate(network.layers, 1)
        for part in ("weight", "bias")
    )
