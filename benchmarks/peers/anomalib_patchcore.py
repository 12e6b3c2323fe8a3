"""anomalib's PatchCore, measured as benchmarks/patchcore.py asks for; runs in anomalib's own environment.

python anomalib_patchcore.py '{"folder": …, "weights": …, "judged": …, "coreset": 0.01, "extrapolate": 500, "full": 0}'

`folder` holds train/good, test/good and test/defect. Training goes through anomalib's Engine and Folder data module.
Its `fit` stage is split by its own hooks: from the start of training to the call that chooses the coreset (decoding and
features overlap in its loader's processes), and that call. Prediction of one image is its `read_image`, its
pre-processor and its model; of batches, its data loader, pre-processor and model; and both as its `Engine.predict` does
it, image by image, with post-processing. Its checkpoint, threshold and
normalisation are not timed. Scores and maps of the test images go to `judged`; the last line printed is JSON.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch

REPEATED_IMAGES = 160  # prediction in batches is timed over at least this many
SIZE = 256


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    job = json.loads(sys.argv[1])
    bare = memory("VmRSS")
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    model, result = fit(job)
    with torch.inference_mode():
        files = sorted(Path(job["folder"], "test").rglob("*.*"))
        result["predict_1"] = statistics.median(one_by_one(model, files))
        result["predict_16"] = statistics.median(in_batches(model, job["folder"]))
        result["predict_engine"] = statistics.median(in_its_engine(model, job["folder"]))
        result["memory"] = memory("VmHWM") - bare
        if not result["extrapolated"]:
            result["radius"] = cover_radius(model, job["folder"])
            judge(model, files, job["judged"])
    result["bank"] = len(model.model.memory_bank)
    result["version"] = f"anomalib {version('anomalib')}, torch {torch.__version__}, timm {timm.__version__}"
    print(json.dumps(result), flush=True)


def fit(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The fitted model, and its seconds by stage."""
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    from anomalib.models.components import KCenterGreedy

    class Timed(Patchcore):
        """Takes the time at its own hooks; stops after some picks of the coreset where all would take too long."""

        def on_train_start(self) -> None:
            super().on_train_start()
            self.started = time.perf_counter()

        def fit(self) -> None:
            self.features = time.perf_counter() - self.started
            patches = sum(len(part) for part in self.model.embedding_store)
            picks = int(patches * self.coreset_sampling_ratio)
            self.extrapolated = not job["full"] and picks > job["extrapolate"]
            start = time.perf_counter()
            if self.extrapolated:
                self.coreset = self.extrapolate(picks)
            else:
                super().fit()
                self.coreset = time.perf_counter() - start

        def extrapolate(self, picks: int) -> float:
            """Seconds for all picks from those for the first; the bank is filled with any rows, to time the search."""
            rows = torch.vstack(self.model.embedding_store)
            self.model.embedding_store.clear()
            seconds = []
            for count in (1, job["extrapolate"]):
                sampler = KCenterGreedy(rows, sampling_ratio=(count + 0.5) / len(rows))
                start = time.perf_counter()
                sampler.select_coreset_idxs()
                seconds.append(time.perf_counter() - start)
            self.model.memory_bank = rows[torch.randperm(len(rows))[:picks]]
            return seconds[0] + (seconds[1] - seconds[0]) * (picks - 1) / (job["extrapolate"] - 1)

    model = Timed(
        backbone="resnet18",
        layers=["layer2", "layer3"],
        pre_trained=False,
        coreset_sampling_ratio=job["coreset"],
        pre_processor=Patchcore.configure_pre_processor(image_size=(SIZE, SIZE)),
        evaluator=False,
        visualizer=False,
    )
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict(torch.load(job["weights"], map_location="cpu", weights_only=True))
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        engine = Engine(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=scratch, **quiet)
        engine.fit(model=model, datamodule=images(job["folder"]))
    model = model.eval()
    seconds = {"features": model.features, "coreset": model.coreset, "fit": model.features + model.coreset}
    return model, {"seconds": seconds, "extrapolated": model.extrapolated}


def images(folder: str) -> Any:
    """anomalib's data module over the folder, with as many loader processes as there are cores."""
    from anomalib.data import Folder

    return Folder(
        name="benchmark",
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/defect",
        train_batch_size=32,
        eval_batch_size=16,
        num_workers=min(8, os.cpu_count() or 1),
        val_split_mode="none",
    )


def one_by_one(model: Any, files: list[Path]) -> Iterator[float]:
    """Seconds for each image, decoding included, after three to warm up."""
    for file in files[:3]:
        predict(model, file)
    for file in files:
        start = time.perf_counter()
        predict(model, file)
        yield time.perf_counter() - start


def predict(model: Any, file: Path) -> Any:
    from anomalib.data.utils import read_image

    return model.model(model.pre_processor(read_image(file, as_tensor=True)[None]))


def in_its_engine(model: Any, folder: str) -> list[float]:
    """Seconds for each image as `Engine.predict` gives them, with its callbacks, after three to warm up."""
    from anomalib.engine import Engine
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(accelerator="cpu", devices=1, default_root_dir=scratch, callbacks=[clock], **quiet)
        engine.predict(model=model, data_path=Path(folder, "test"), return_predictions=False)
    return [after - before for before, after in pairwise(clock.times[3:])]


def in_batches(model: Any, folder: str) -> Iterator[float]:
    """Seconds an image, for each full batch of 16 but the first, while the loader's processes decode ahead."""
    data = images(folder)
    data.setup()
    loader = data.test_dataloader()
    passes = -(-REPEATED_IMAGES // len(loader.dataset))
    repeated = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([loader.dataset] * passes),
        batch_size=16,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=True,
    )
    last = None
    for batch in repeated:
        model.model(model.pre_processor(batch.image))
        now = time.perf_counter()
        if last is not None:
            yield (now - last) / 16
        last = now


def cover_radius(model: Any, folder: str) -> float:
    """Distance of the training patch that is farthest from its nearest entry of the memory bank."""
    data = images(folder)
    data.setup()
    farthest = 0.0
    for batch in data.train_dataloader():
        model.model.train()
        rows = model.model(model.pre_processor(batch.image))
        model.model.embedding_store.clear()
        model.model.eval()
        for part in rows.split(1024):
            farthest = max(farthest, float(torch.cdist(part, model.model.memory_bank).amin(1).max()))
    return farthest


def judge(model: Any, files: list[Path], target: str) -> None:
    """Write each test image's raw score and map."""
    import numpy as np

    outcomes = [predict(model, file) for file in files]
    scores = torch.stack([outcome.pred_score.squeeze() for outcome in outcomes]).numpy()
    maps = torch.stack([outcome.anomaly_map.squeeze() for outcome in outcomes]).numpy()
    np.savez(target, scores=scores, maps=maps)


if __name__ == "__main__":
    main()
