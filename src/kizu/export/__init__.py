"""A trained model in other people's formats: ONNX, OpenVINO, and the files of the published systems."""

from kizu.export.onnx import export

__all__ = ["export"]
