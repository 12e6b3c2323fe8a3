"""The state of a training that can be killed: written now and then, whole or not at all."""

import time
from pathlib import Path
from typing import Any, Protocol

import torch

from kizu.data import files
from kizu.errors import ModelError

__all__ = ["Checkpoint", "Stateful"]

EVERY = 60.0  # seconds between two writings


class Stateful(Protocol):
    """A module, an optimiser, or anything else that has a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Checkpoint:
    """Step, parts and random numbers of a training in one file; without a file, nothing happens.

    A training that goes on from it ends as it would have ended undisturbed, provided that everything random comes from
    torch's generators or from the step's number.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], parts: dict[str, Stateful]) -> None:
        """`about` are plain values that must be the same when a training goes on."""
        self.path, self.about, self.parts = path, about, parts
        self.written = time.monotonic()

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Put everything back as it was; the number of steps done, and the extra values that came with them.

        Raises `ModelError` for a file of another training, or a damaged one.
        """
        if self.path is None or not self.path.exists():
            return 0, {}
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            changed = [
                key for key in {**self.about, **state["about"]} if self.about.get(key) != state["about"].get(key)
            ]
            if not changed:
                for name, part in self.parts.items():
                    part.load_state_dict(state["parts"][name])
                torch.set_rng_state(state["random"])
                if torch.cuda.is_available() and state["cuda"]:
                    torch.cuda.set_rng_state_all(state["cuda"])
                return int(state["step"]), state["extra"]
        except Exception as error:  # a broken file raises anything
            raise ModelError(
                f"{self.path}: the training's state is damaged ({type(error).__name__}); remove it"
            ) from None
        raise ModelError(f"{self.path} belongs to a training with other {', '.join(sorted(changed))}: remove it")

    @property
    def due(self) -> bool:
        """Whether there is a file to write to, and the last writing is long ago."""
        return self.path is not None and time.monotonic() - self.written >= EVERY

    def write(self, step: int, extra: dict[str, Any]) -> None:
        """Write the state after `step` steps, with extra plain values."""
        if self.path is None:
            return
        state = {
            "about": self.about,
            "step": step,
            "extra": extra,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with files.new_file(self.path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        self.written = time.monotonic()

    def remove(self) -> None:
        """Take the file away: the training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
