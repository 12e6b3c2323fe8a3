"""What runs an exported graph: onnxruntime or OpenVINO, without torch and without telling anybody."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.errors import ModelError, require
from kizu.inference.processor import cores

__all__ = ["ENGINES", "Run", "open_graph"]

Run = Callable[[npt.NDArray[np.uint8], Sequence[str]], list[npt.NDArray[Any]]]  # pixels, names of outputs → outputs


def open_graph(folder: Path, format: str) -> Run:
    """The graph in a folder, ready to run. Raises `ModelError` where it cannot be opened."""
    if format not in ENGINES:
        raise ModelError(f"{folder}: exported to {format}, which this version of kizu does not know")
    try:
        return ENGINES[format](folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: the exported graph cannot be opened ({str(error).splitlines()[0]})") from None


def _onnxruntime(folder: Path) -> Run:
    onnxruntime = require("onnxruntime")
    onnxruntime.disable_telemetry_events()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = cores()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may need the core meanwhile
    settings.log_severity_level = 3
    try:
        file = str(folder / "model.onnx")
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that onnxruntime does not export
        raise ModelError(f"{folder}: model.onnx cannot be opened ({str(error).splitlines()[0]})") from None

    def run(pixels: npt.NDArray[np.uint8], names: Sequence[str]) -> list[npt.NDArray[Any]]:
        try:
            outputs: list[npt.NDArray[Any]] = session.run(list(names), {"images": pixels})
        except Exception as error:  # as above
            raise ModelError(f"{folder}: model.onnx does not run ({str(error).splitlines()[0]})") from None
        return outputs

    return run


def _openvino(folder: Path) -> Run:
    core = require("openvino").Core()
    # single precision even where the processor has faster ones, and threads for one image at a time
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": cores(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(folder / "model.xml")), "CPU", settings)

    def run(pixels: npt.NDArray[np.uint8], names: Sequence[str]) -> list[npt.NDArray[Any]]:
        request = compiled.create_infer_request()  # a request serves one thread at a time
        request.infer({"images": pixels})
        return [request.get_tensor(name).data.copy() for name in names]

    return run


ENGINES: Mapping[str, Callable[[Path], Run]] = {"onnx": _onnxruntime, "openvino": _openvino}
