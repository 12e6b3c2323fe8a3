"""A data set without a download: rendered photographs of a turned flange, good and with four kinds of defects."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from kizu.data import files, image
from kizu.data.demo.flange import DEFECTS, Job, Studio, new_studio, photograph
from kizu.errors import DataError, OptionError

__all__ = ["DEFECTS", "render"]


def render(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: int = 160,
    good: int = 40,
    each: int = 15,
    size: int = 320,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write <root>/flange in MVTec AD layout and return it: the same seed, the same bytes.

    `train` and `good` count good images, `each` those of every defect; all are `size` × `size` pixels.
    `progress` is called with the number of images done and their total.

    Raises `DataError` when <root>/flange exists, `OutputError` when it cannot be written, `OptionError` for senseless
    numbers.
    """
    if seed < 0 or train < 1 or min(good, each) < 0 or size < 96:
        raise OptionError(
            f"The demo needs seed ≥ 0, train ≥ 1, good ≥ 0, each ≥ 0 and size ≥ 96, "
            f"but got {seed}, {train}, {good}, {each} and {size}."
        )
    jobs = [("train", "good", index) for index in range(train)] + [("test", "good", index) for index in range(good)]
    jobs += [("test", defect, index) for defect in DEFECTS for index in range(each)]
    target = Path(root) / "flange"
    if target.exists():
        raise DataError(f"{target} exists already: delete it or choose another folder.")
    with files.new_folder(target) as unfinished:
        _write_all(unfinished, new_studio(seed, size), jobs, progress)
    return target


def _write_all(folder: Path, studio: Studio, jobs: list[Job], progress: Callable[[int, int], None] | None) -> None:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(_write, folder, studio, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write(folder: Path, studio: Studio, job: Job) -> None:
    split, kind, index = job
    rgb, mask = photograph(studio, job)
    image.write(folder / split / kind / f"{index:03}.jpg", rgb)
    if kind in DEFECTS:
        image.write(folder / "ground_truth" / kind / f"{index:03}_mask.png", mask.astype(np.uint8) * 255)
