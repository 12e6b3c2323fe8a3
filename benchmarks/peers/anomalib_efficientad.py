"""anomalib's EfficientAD, timed as benchmarks/efficientad.py asks for; runs in anomalib's own environment.

python anomalib_efficientad.py '{"size": "s", "side": 256, "batches": [1, 16]}'

Its model from float images in memory to scores and maps; its pre-processor (a resize) is not timed. The last line
printed is JSON: milliseconds per image.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version

import torch


def main() -> None:
    warnings.simplefilter("ignore")
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    job = json.loads(sys.argv[1])
    size = {"s": EfficientAdModelSize.S, "m": EfficientAdModelSize.M}[job["size"]]
    model = EfficientAdModel(model_size=size).eval()
    for parameters in (model.mean_std, model.quantiles):
        for value in parameters.values():
            value.data.fill_(0.5)
    model.quantiles["qb_st"].data.fill_(1.0)
    model.quantiles["qb_ae"].data.fill_(1.0)
    result = {"version": f"anomalib {version('anomalib')}, torch {torch.__version__}"}
    with torch.inference_mode():
        for batch in job["batches"]:
            images = torch.rand(batch, 3, job["side"], job["side"])
            model(images)
            model(images)
            result[str(batch)] = []
            for _ in range(max(3, 12 // batch)):
                start = time.perf_counter()
                model(images)
                result[str(batch)].append(1000 * (time.perf_counter() - start) / batch)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
