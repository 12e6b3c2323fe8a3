"""anomalib's PatchCore, exported by anomalib to OpenVINO, as benchmarks/runtime.py asks for; in anomalib's environment.

python anomalib_openvino.py '{"folder": …, "train": […], "weights": …, "entries": 4280}'     writes folder/…/model.xml
python anomalib_openvino.py '{"folder": …, "files": […], "precision": "default" or "f32"}'   times what lies there

The memory bank is filled with as many training patches as asked for, taken at random: the search costs the same, and
nothing is said of accuracy. Prediction is what anomalib's own `OpenVINOInferencer.predict` does, from a file's name to
scores and map, for as many images at a time as the exported graph takes: two, and no other number.
The last line printed is JSON.
"""

import json
import logging
import os
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZE = 256


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.chdir(job["folder"])  # where the inferencer puts its cache
    result = export(job) if "train" in job else predict(job)
    print(json.dumps(result), flush=True)


def export(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from anomalib.data.utils import read_image
    from anomalib.deploy import ExportType
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    pre_processor = Patchcore.configure_pre_processor(image_size=(SIZE, SIZE))
    quiet = {"evaluator": False, "visualizer": False}
    model = Patchcore(
        backbone="resnet18", layers=["layer2", "layer3"], pre_trained=False, pre_processor=pre_processor, **quiet
    )
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict(torch.load(job["weights"], map_location="cpu", weights_only=True))
    model.model.train()
    with torch.inference_mode():
        rows = [model.model(model.pre_processor(read_image(file, as_tensor=True)[None])) for file in job["train"]]
    rows = torch.cat(rows).clone()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: job["entries"]]
    model.model.embedding_store.clear()
    model.model.memory_bank = rows[chosen].clone()
    model.eval()
    Engine(logger=False).export(model=model, export_type=ExportType.OPENVINO, export_root=job["folder"])
    return {"bank": len(model.model.memory_bank), "version": f"anomalib {version('anomalib')}"}


def predict(job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from anomalib.data import NumpyImageBatch
    from anomalib.data.utils import read_image
    from anomalib.deploy import OpenVINOInferencer

    path = next(Path(job["folder"]).rglob("model.xml"))
    config = None if job["precision"] == "default" else {"INFERENCE_PRECISION_HINT": job["precision"]}
    inferencer = OpenVINOInferencer(path, device="CPU", config=config)
    batch = inferencer.model.input(0).partial_shape[0]
    together = 1 if batch.is_dynamic else batch.get_length()
    seconds = []
    for start in range(0, len(job["files"]) - together + 1, together):
        begun = time.perf_counter()
        pictures = [read_image(file, as_tensor=False) for file in job["files"][start : start + together]]
        pixels = np.concatenate([inferencer.pre_process(picture) for picture in pictures])
        outcome = inferencer.model({inferencer.input_blob.any_name: pixels})
        NumpyImageBatch(image=pixels, **inferencer.post_process(outcome))
        seconds.append((time.perf_counter() - begun) / together)
    del seconds[:3]  # which warmed it up
    return {"seconds": statistics.median(seconds), "version": f"openvino {version('openvino')}"}


if __name__ == "__main__":
    main()
