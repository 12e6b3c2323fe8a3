"""Graphs that are being recorded for another engine."""

import torch

__all__ = ["is_traced"]


def is_traced() -> bool:
    """Whether a graph is being recorded, for any number of images, rather than run."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
