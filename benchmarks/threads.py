"""What a network costs an image when a CPU takes many at once, and an image a thread as kizu does.

python benchmarks/threads.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from kizu.cli.terminal import print_table
from kizu.evaluation.experiment import machine
from kizu.features import backbone

NETWORKS = {"efficientnet_lite2": 320, "resnet18": 256}  # name → input size; random weights cost the same
IMAGES, TURNS = 16, 9


def main() -> None:
    rows = []
    for name, side in NETWORKS.items():
        network = backbone.blank(name, size=(side, side)).eval()
        images = torch.randint(0, 256, (IMAGES, 3, side, side), dtype=torch.uint8)
        with torch.inference_mode():
            together, apart = alternately(lambda: network._maps(images), lambda: network(images))  # noqa: B023
        cells = {"network": name, "input": f"{side}×{side}", "ms, 16 at once": f"{together:.2f}"}
        rows.append({**cells, "ms, an image a thread": f"{apart:.2f}", "ratio": f"{together / apart:.2f}"})
    print_table(rows)
    print(f"\n{machine()['summary']}, {torch.get_num_threads()} threads")


def alternately(*ways: Callable[[], object]) -> list[float]:
    """Milliseconds an image of each way, the median of turns."""
    spent: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS):
        for way, seconds in zip(ways, spent, strict=True):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) / IMAGES for seconds in spent]


if __name__ == "__main__":
    main()
