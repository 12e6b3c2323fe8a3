"""How long a training takes, told as soon as it can be known."""

import logging
import time

import torch

__all__ = ["Pace"]

log = logging.getLogger("kizu")
WORTH_TELLING = 600  # seconds
MEASURED = 3  # steps, after the first


class Pace:
    """Measures the first steps and says what all of them will take where there is no GPU."""

    def __init__(self, steps: int, device: torch.device, advice: str) -> None:
        self.left, self.device, self.advice = steps, device, advice
        self.taken, self.started = 0, 0.0

    def step(self) -> None:
        """A step is done."""
        self.taken += 1
        if self.taken == 1:
            self.started = time.perf_counter()
        elif self.taken == 1 + MEASURED and self.device.type == "cpu":
            each = (time.perf_counter() - self.started) / MEASURED
            if (total := each * self.left) > WORTH_TELLING:
                log.warning(
                    "There is no GPU that torch can use: %s steps of %.1f s take about %.1f hours. %s",
                    *(f"{self.left:,}", each, total / 3600, self.advice),
                )
