"""What all parts use: rows, the time that is left, medians of times, and the ways in which a network can be run."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kizu.data.files import write_csv

Run = Callable[[Tensor], Any]
COMPILING = 25.0  # seconds that a compilation may take on a GPU: with less left it is not begun
LONGEST = 0.25  # seconds that one time is measured for


@dataclass
class Row:
    """A line of the results. All values are text, as they are shown and written."""

    part: str
    what: str
    variant: str = ""
    batch: str = ""
    value: str = ""
    unit: str = ""
    rate: str = ""  # a second
    off: str = ""
    remark: str = ""

    @staticmethod
    def columns() -> list[str]:
        return ["a second" if column.name == "rate" else column.name for column in fields(Row)]

    def values(self) -> tuple[str, ...]:
        return astuple(self)


def write(path: Path, rows: Sequence[Row]) -> None:
    write_csv(path, Row.columns(), (row.values() for row in rows))


@dataclass(eq=False)
class Job:
    """What a part is to do, and until when."""

    part: str
    device_name: str
    pack: Path
    output: Path
    end: float  # of time.monotonic()
    send: Callable[[Row], None] = field(default=lambda row: None)

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def full(self) -> bool:
        """On a GPU; on a CPU everything is as small as it can be, and measured once."""
        return self.device_name == "cuda"

    @property
    def longest(self) -> float:
        return LONGEST if self.full else 0.0

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def row(self, what: str, variant: str = "", **values: str) -> None:
        self.send(Row(self.part, what, variant, **values))

    def number(self, what: str, value: float, unit: str, variant: str = "", **values: str) -> None:
        self.row(what, variant, value=shown(value), unit=unit, **values)


def shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, longest: float = LONGEST) -> float:
    """The median of several times, at least three, after two to warm up; of no length, the time of one call."""
    if longest == 0:
        return elapsed(work, device)
    times: list[float] = []
    work()
    synchronise(device)
    first = elapsed(work, device)
    for _ in range(max(3, min(200, int(longest / max(first, 1e-6))))):
        times.append(elapsed(work, device))
    return statistics.median(times)


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


@contextmanager
def products(*, convolutions: bool, matrices: bool) -> Iterator[None]:
    """Whether single precision may be computed in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, matrices
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Variant:
    """A way to run a network."""

    name: str
    bf16: bool = False
    strict: bool = False  # no TF32
    tf32: bool = False  # in matrix products too
    compiled: bool = False
    captured: bool = False  # as a CUDA graph
    only: frozenset[int] = frozenset()  # batches, if not all

    def contexts(self, device: torch.device) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(products(convolutions=not self.strict, matrices=self.tf32))
        # without the cache of cast weights: a graph may not be captured with one that was made outside of it
        stack.enter_context(
            torch.autocast(device.type, torch.bfloat16, cache_enabled=not self.captured) if self.bf16 else nullcontext()
        )
        return stack

    def prepare(self, module: nn.Module, images: Tensor) -> Run:
        run: Run = module
        if self.compiled:
            torch._dynamo.reset()
            backend = "inductor" if images.is_cuda else "aot_eager"  # which records the same graph and compiles nothing
            run = torch.compile(module, backend=backend)
        return captured(run, images) if self.captured else run


VARIANTS = (
    Variant("strict float32", strict=True),
    Variant("as it comes"),
    Variant("TF32 everywhere", tf32=True),
    Variant("bf16", bf16=True),
    Variant("CUDA graph", captured=True),
    Variant("CUDA graph, bf16", captured=True, bf16=True),
    Variant("compiled", compiled=True),
    Variant("compiled, CUDA graph, bf16", compiled=True, captured=True, bf16=True),
)


def captured(run: Run, images: Tensor) -> Run:
    """The same, recorded once and played again. Its outputs are overwritten by the next call."""
    if not images.is_cuda:
        raise RuntimeError("a CUDA graph needs CUDA")
    held = images.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(held)

    def replay(new: Tensor) -> Any:
        held.copy_(new)
        graph.replay()
        return outputs

    return replay


def measure(
    job: Job,
    what: str,
    module: nn.Module,
    make: Callable[[int], Tensor],
    batches: Sequence[int],
    variants: Sequence[Variant] = VARIANTS,
    reference: nn.Module | None = None,
) -> None:
    """A row for each variant and batch: ms an image, images a second, and how far its results are off.

    `make` gives inputs (B, …). Results are compared with those of `reference`, or of the module, in strict float32.
    What is compiled comes last, because that takes long.
    """
    pairs = [(variant, batch) for variant in variants for batch in batches]
    for variant, batch in sorted(pairs, key=lambda pair: pair[0].compiled):
        needed = COMPILING if variant.compiled and job.full else 0.5
        if job.left() < needed:
            job.row(what, variant.name, batch=str(batch), remark="left out: the time was over")
            continue
        images = make(batch)
        try:
            with VARIANTS[0].contexts(job.device):
                expected = tensors((reference or module)(images))
            with variant.contexts(job.device):
                start = time.perf_counter()
                run = variant.prepare(copy.deepcopy(module) if variant.compiled else module, images)
                off = difference(expected, tensors(run(images)))
                synchronise(job.device)
                first = time.perf_counter() - start
                each = seconds(lambda run=run, images=images: run(images), job.device, job.longest)
            remark = f"{first:.1f} s to prepare" if variant.compiled or variant.captured else ""
            ms = 1000 * each / batch
            job.number(
                what, ms, "ms / image", variant.name, batch=str(batch), rate=shown(1000 / ms), off=off, remark=remark
            )
        except Exception as error:  # whatever a GPU, a compiler or a driver says becomes a row
            job.row(what, variant.name, batch=str(batch), remark=first_line(error))


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of nested outputs, copied."""
    if isinstance(outputs, Tensor):
        return [outputs.float().clone()]
    return [tensor for output in outputs for tensor in tensors(output)]


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """The largest difference in units of the largest value, over all outputs."""
    shares = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(expected, found, strict=True)]
    return f"{max(shares):.1e}"
