"""Smaller exported graphs: half-precision weights, or 8-bit convolutions calibrated on photographs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.errors import require

__all__ = ["MIN_HALVED_SIZE", "halve", "quantise"]

MIN_HALVED_SIZE = 1024  # numbers in a tensor that is worth halving
EXACT_ENDS = 4  # convolutions at either end stay in single precision: what distances are made from suffers most there


def halve(file: Path) -> None:
    """Store large single-precision tables of an ONNX file in half precision; it still computes in single precision."""
    onnx: Any = require("onnx")
    model = onnx.load(str(file))
    single = onnx.TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type != single or len(tensor.dims) < 2 or np.prod(tensor.dims) < MIN_HALVED_SIZE:
            continue
        name, stored = tensor.name, f"{tensor.name} half"
        values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, stored))
        model.graph.node.insert(0, onnx.helper.make_node("Cast", [stored], [name], to=single))
    onnx.save(model, str(file))


def quantise(source: Path, target: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write an ONNX file with its inner convolutions in 8 bits, scaled to what photographs (N, 3, H, W) need.

    Everything else, the search in a memory bank above all, stays in single precision.
    """
    quantisation: Any = require("onnxruntime.quantization")
    nodes = require("onnx").load(str(source), load_external_data=False).graph.node
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    with _quiet():
        quantisation.quantize_static(
            str(source),
            str(target),
            _CalibrationReader(pixels),
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=convolutions[:EXACT_ENDS] + convolutions[-EXACT_ENDS:],
            per_channel=True,
            activation_type=quantisation.QuantType.QUInt8,
            weight_type=quantisation.QuantType.QInt8,
        )


class _CalibrationReader:
    """Photographs one by one, as onnxruntime asks for them."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self._feeds: Iterator[dict[str, Any]] = iter({"images": photo[None]} for photo in pixels)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that onnxruntime logs while it quantises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
