"""One photograph at a time in, batches through the model: a bounded queue with a thread behind it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kizu.data import image
from kizu.errors import BadImage, KizuError
from kizu.inference.prediction import Evidence, Prediction

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["Answer", "Batcher", "LoadedModel", "PixelGate", "QueueFull", "Upload"]


class QueueFull(KizuError):
    """More photographs are waiting than may wait."""

    kind = "busy"


class PixelGate:
    """Threads decode photographs at the same time as long as these have so few pixels together; the rest wait in line.

    A photograph with more pixels than that is decoded alone.
    """

    def __init__(self, pixels: int) -> None:
        self._capacity = pixels
        self._inside = 0
        self._left = threading.Condition()
        self._line = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for so many pixels, and take it inside the block. May be nested."""
        if getattr(self._mine, "holds", False):
            yield
            return
        pixels = min(pixels, self._capacity)
        with self._line, self._left:
            self._left.wait_for(lambda: self._inside + pixels <= self._capacity)
            self._inside += pixels
        self._mine.holds = True
        try:
            yield
        finally:
            self._mine.holds = False
            with self._left:
                self._inside -= pixels
                self._left.notify_all()


@dataclass(frozen=True)
class Upload:
    """An encoded photograph and what its sender calls it; with a `gate` it is decoded when there is room."""

    content: bytes
    name: str
    gate: PixelGate | None = None

    def at_work(self) -> AbstractContextManager[None]:
        """The block in which the photograph may take memory. Raises `BadImage` where its header cannot be read."""
        if self.gate is None:
            return nullcontext()
        height, width = image.size_of(self.content, large=True)
        return self.gate.hold(height * width)

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        with self.at_work():
            return image.read_at_least(self.content, at_least, white, large=large)


@dataclass(frozen=True)
class LoadedModel:
    """A model as it was when it was loaded."""

    model: "Inspector"
    version: str
    time: float  # seconds since 1970


@dataclass(frozen=True)
class Answer:
    """What a model says of an upload, and which model it was."""

    outcome: "Prediction | BadImage"
    loaded: LoadedModel
    evidence: Sequence[Evidence] = ()


@dataclass(frozen=True)
class _Job:
    upload: Upload
    explain: bool
    answer: Future[Answer] = field(default_factory=Future)


class Batcher:
    """Judges uploads in the order in which they come, as many at once as are waiting, up to a batch.

    Nobody waits for a batch to fill: while the model is at work, the next batch gathers. Replacing `loaded` lets the
    next batch run on another model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        room: int = 64,
        batch: int = 8,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Up to `room` photographs may wait; `on_batch` gets the size of each batch."""
        self.loaded = loaded
        self.room = room
        self._batch = batch
        self._on_batch = on_batch
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many photographs wait."""
        return len(self._waiting)

    def submit(self, uploads: Sequence[Upload], *, explain: bool = False) -> list[Future[Answer]]:
        """Put all uploads into the queue, or none and raise `QueueFull`. A cancelled future is not judged."""
        jobs = [_Job(upload, explain) for upload in uploads]
        with self._changed:
            if self._closed or len(self._waiting) + len(jobs) > self.room:
                raise QueueFull(f"{len(self._waiting)} photographs are waiting, and at most {self.room} may")
            self._waiting.extend(jobs)
            self._changed.notify()
        return [job.answer for job in jobs]

    def close(self) -> None:
        """Take no more uploads, and answer those that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if jobs:
                self._on_batch(len(jobs))
                self._judge(jobs)

    def _take(self) -> list[_Job] | None:
        """The next batch, or None when the batcher is closed and the queue is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            return [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]

    def _judge(self, jobs: Sequence[_Job]) -> None:
        loaded = self.loaded
        job_of = {id(job.upload): job for job in jobs}
        try:
            for upload, outcome in loaded.model.judge([job.upload for job in jobs], batch_size=self._batch):
                job = job_of[id(upload)]
                evidence = outcome.why() if job.explain and not isinstance(outcome, BadImage) else ()
                job.answer.set_result(Answer(outcome, loaded, evidence))
        except Exception as error:  # whatever it is, it reaches those who wait, and the next batch goes on
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
