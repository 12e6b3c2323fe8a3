"""How long work tells how far it has come."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]  # the stage's name, how many are done, of how many


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
