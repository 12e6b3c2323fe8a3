"""The parts by name: what each measures is in the module of its name."""

from collections.abc import Callable

import torch

from kizu.evaluation.experiment import machine, versions
from on_gpu import efficientad, patchcore, simplenet, suite, teacher, training
from on_gpu.measure import Job, elapsed, shown

__all__ = ["PARTS"]


def describe(job: Job) -> None:
    """What is measured on."""
    job.row("machine", value=machine()["summary"])
    for name, version in versions().items():
        job.row(name, value=version)
    if not job.full:
        return
    about = torch.cuda.get_device_properties(0)
    job.row(
        "GPU", value=about.name, remark=f"{about.multi_processor_count} multiprocessors, {about.major}.{about.minor}"
    )
    job.number("memory", about.total_memory / 2**30, "GiB")
    job.row("CUDA, cuDNN", value=f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        square = torch.randn(8192, 8192, device=job.device, dtype=dtype)
        square @ square
        time = min(elapsed(lambda square=square: square @ square, job.device) for _ in range(5))
        job.row("matrix product 8192³", name, value=shown(2 * 8192**3 / time / 1e12), unit="TFLOP/s")


PARTS: dict[str, Callable[[Job], None]] = {
    "machine": describe,
    "tests": suite.run,
    "patchcore": patchcore.run,
    "efficientad": efficientad.run,
    "simplenet": simplenet.run,
    "teacher": teacher.run,
    "training": training.run,
}
