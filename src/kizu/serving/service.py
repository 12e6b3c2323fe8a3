"""What a server does, whatever the protocol: judge uploads, keep verdicts, collect feedback, follow its models."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kizu.calibration.captures import kind_of
from kizu.data import image
from kizu.errors import BadImage, KizuError, OutputError
from kizu.inference.exported import Exported
from kizu.inference.prediction import Prediction
from kizu.inference.verdict import Verdict
from kizu.serving.batcher import Answer, Batcher, LoadedModel, PixelGate, QueueFull, Upload
from kizu.serving.feedback import Label, collect, count
from kizu.serving.history import HISTORY, History
from kizu.serving.hosted_model import HostedModel, read_model
from kizu.serving.limits import Budget, Limits, Refusal, check, refusal_of
from kizu.serving.observability import Counters, Sample, log
from kizu.serving.responses import ResponseOptions, describe_model, map_shape, thumbnail, to_response
from kizu.serving.schemas import Collected, Model, Predictions, Result

__all__ = ["Service"]

T = TypeVar("T")

FOLLOW_INTERVAL = 1.0  # seconds between looks for replaced folders
ANSWERING_THREADS = 2  # few: the C library keeps for each what its largest photograph took
MAP_BYTES = 16  # of memory that a pixel of a map takes while it is encoded


class Service:
    """The hosted models and what is kept of their work. Close it at the end: it answers what waits."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        limits: Limits,
        *,
        store: Path,
        keep: int = 0,
        batch: int = 8,
        sets_thresholds: bool = False,
    ) -> None:
        """Read the models in `folders`, whose thresholds may be set where it `sets_thresholds`.

        Raises `KizuError` where one of them, or the history, cannot be read.
        """
        self.limits = limits
        self.store = store
        self._sets_thresholds = sets_thresholds
        self.counters = Counters()
        self.budget = Budget(limits.memory)
        self._gate = PixelGate(limits.pixels)
        self._threads = ThreadPoolExecutor(ANSWERING_THREADS, "answer")
        self.history = History(store / HISTORY, keep) if keep else None
        self.models: dict[str, HostedModel] = {}
        for name, folder in folders.items():
            loaded, stamp = read_model(folder)
            queue = Batcher(loaded, room=limits.images, batch=batch, on_batch=self._batch_counter(name))
            self.models[name] = HostedModel(name, folder, queue, stamp)

    def pick(self, name: str | None) -> HostedModel:
        """A model by its name, or the only one. Raises `Refusal`."""
        names = ", ".join(self.models)
        if name is None and len(self.models) > 1:
            raise Refusal("invalid", f"Say which model, as in model={next(iter(self.models))}; there are: {names}")
        hosted = next(iter(self.models.values())) if name is None else self.models.get(name)
        if hosted is None:
            raise Refusal("unknown", f"There is no model {name}; there are: {names}")
        return hosted

    async def predict(
        self, hosted: HostedModel, uploads: Sequence[Upload], options: ResponseOptions, keep: bool
    ) -> Predictions:
        """Verdicts on uploads, in their order.

        Raises `Refusal` where no upload can be judged, where the queue is full, where the answer would be too large,
        and where it takes too long.
        """
        uploads = [replace(upload, gate=self._gate) for upload in uploads]
        problems = await self._in_a_thread(self._problems, uploads)
        pixels = self._map_pixels([u for u, problem in zip(uploads, problems, strict=True) if not problem], options)
        with self.budget.hold(pixels * MAP_BYTES):
            return await self._predict(hosted, uploads, problems, options, keep)

    async def _predict(
        self,
        hosted: HostedModel,
        uploads: Sequence[Upload],
        problems: Sequence[Refusal | None],
        options: ResponseOptions,
        keep: bool,
    ) -> Predictions:
        usable = [upload for upload, problem in zip(uploads, problems, strict=True) if problem is None]
        answers = iter(await self._answers(hosted, usable, options.why) if usable else [])
        loaded = hosted.loaded
        results: list[Result] = []
        for upload, problem in zip(uploads, problems, strict=True):
            if problem is None:
                answer = next(answers)
                loaded = answer.loaded
                if isinstance(answer.outcome, BadImage):
                    problem = refusal_of(upload, answer.outcome)
            if problem is not None and len(uploads) == 1:
                raise problem
            if problem is not None:
                results.append(Result(image=upload.name, verdict="error", error=str(problem)))
            else:
                results.append(await self._in_a_thread(self._finish, hosted, upload, answer, options, keep))
            self.counters.add("kizu_verdicts_total", model=hosted.name, verdict=results[-1].verdict)
            if why := kind_of(results[-1].cannot_judge):
                self.counters.add("kizu_cannot_judge_total", model=hosted.name, reason=why)
        if problem is not None and all(result.verdict == "error" for result in results):
            raise Refusal(problem.kind, "; ".join(result.error for result in results))
        return Predictions(model=hosted.name, version=loaded.version, results=results)

    def describe(self, hosted: HostedModel) -> Model:
        """A model, what it promises, and whether its threshold may be set here."""
        settable = self._sets_thresholds and not isinstance(hosted.loaded.model, Exported)
        return describe_model(hosted.name, hosted.loaded, settable=settable)

    async def set_threshold(self, hosted: HostedModel, value: float | None, set_by: str, version: str) -> LoadedModel:
        """Write another threshold into a model's folder, None for the one that its good images give, and read it again.

        Raises `Refusal` where the folder holds another version, is in use by another command, or cannot be written.
        """
        try:
            await asyncio.to_thread(hosted.set_threshold, value, set_by, version)
        except BlockingIOError:
            raise Refusal("conflict", f"Another command is changing {hosted.folder}: try again in a moment") from None
        except OutputError as error:
            raise Refusal("unwritable", str(error)) from None
        except KizuError as error:
            raise Refusal("conflict", str(error)) from None
        return await self.reload(hosted)

    async def reload(self, hosted: HostedModel) -> LoadedModel:
        """Read a model again. Raises `Refusal` where that fails; the loaded one then stays."""
        start = time.perf_counter()
        try:
            loaded = await asyncio.to_thread(hosted.reload)
        except Exception as error:  # whatever a damaged folder makes of the reading
            self.counters.add("kizu_reloads_total", model=hosted.name, outcome="failed")
            reason = str(error) if isinstance(error, KizuError | OSError) else f"{type(error).__name__}: {error}"
            log.error("reload failed", extra={"facts": {"model": hosted.name, "error": reason}})
            raise Refusal("conflict", f"The loaded model stays, because the new one cannot be used: {reason}") from None
        self.counters.add("kizu_reloads_total", model=hosted.name, outcome="done")
        seconds = round(time.perf_counter() - start, 3)
        log.info("reloaded", extra={"facts": {"model": hosted.name, "version": loaded.version, "seconds": seconds}})
        return loaded

    async def follow(self) -> None:
        """Reload models whose folders were replaced, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL)
            for hosted in self.models.values():
                try:
                    if await asyncio.to_thread(hosted.was_replaced):
                        await self.reload(hosted)
                except Refusal:
                    hosted.give_up()
                except Exception:  # it is looked at again in a second
                    log.exception("following failed", extra={"facts": {"model": hosted.name}})

    def collect(self, hosted: HostedModel, uploads: Sequence[Upload], label: Label, number: int | None) -> Collected:
        """Write what a person marked; `number` is the verdict's in the history, if it is kept. Raises `Refusal`."""
        folder = self.store / "feedback" / hosted.name
        for upload in uploads:
            check(upload, self.limits)
        if sum(count(folder)) + len(uploads) > self.limits.feedback:
            advice = "use them with kizu update or kizu tune, then empty the folder"
            raise Refusal("conflict", f"{folder} holds as many photographs as it may, {self.limits.feedback}: {advice}")
        files = []
        for upload in uploads:
            try:
                files.append(str(collect(folder, upload, label)))
            except BadImage as error:
                raise refusal_of(upload, error) from None
            except OutputError as error:
                raise Refusal("unwritable", str(error)) from None
        if number is not None and self.history is not None:
            try:
                self.history.mark(number, label)
            except OutputError as error:
                raise Refusal("unwritable", str(error)) from None
        self.counters.add("kizu_feedback_total", model=hosted.name, label=label)
        good, bad = count(folder)
        return Collected(files=files, good=good, bad=bad)

    def gauges(self) -> list[Sample]:
        """Memory, queues and loading times as they are now."""
        samples = [Sample("kizu_memory_bytes", _resident_bytes())]
        for name, hosted in self.models.items():
            samples.append(Sample("kizu_queue_length", len(hosted.queue), {"model": name}))
            samples.append(Sample("kizu_model_loaded_seconds", hosted.loaded.time, {"model": name}))
        return samples

    def close(self) -> None:
        for hosted in self.models.values():
            hosted.queue.close()
        self._threads.shutdown()
        if self.history is not None:
            self.history.close()

    async def _in_a_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _map_pixels(self, uploads: Sequence[Upload], options: ResponseOptions) -> int:
        """How many pixels the maps in the answer will have. Raises `Refusal` where they are too many."""
        if options.map == "none":
            return 0
        shapes = (map_shape(image.size_of(upload.content, large=True), options.map_size) for upload in uploads)
        pixels = sum(height * width for height, width in shapes)
        if pixels > self.limits.map_pixels:
            sizes = (
                f"{pixels / 1e6:.1f} megapixels together, and at most {self.limits.map_pixels / 1e6:g} fit an answer"
            )
            raise Refusal(
                "too-large",
                f"The maps would have {sizes}: give a map_size, or a smaller one, or send fewer photographs",
            )
        return pixels

    def _problems(self, uploads: Sequence[Upload]) -> list[Refusal | None]:
        """For each upload, what its header says is wrong with it."""
        problems: list[Refusal | None] = []
        for upload in uploads:
            try:
                check(upload, self.limits)
                problems.append(None)
            except Refusal as problem:
                problems.append(problem)
        return problems

    async def _answers(self, hosted: HostedModel, uploads: Sequence[Upload], explain: bool) -> list[Answer]:
        try:
            futures = hosted.queue.submit(uploads, explain=explain)
        except QueueFull as error:
            raise Refusal("busy", f"{error}: come again in a second") from None
        try:
            async with asyncio.timeout(self.limits.seconds):
                return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        except TimeoutError:
            raise Refusal("late", f"There was no verdict within {self.limits.seconds:g} seconds") from None

    def _finish(
        self, hosted: HostedModel, upload: Upload, answer: Answer, options: ResponseOptions, keep: bool
    ) -> Result:
        """The result as it is sent; its verdict goes into the history, where there is one."""
        with upload.at_work():
            outcome = answer.outcome
            if isinstance(outcome, Prediction):
                outcome = replace(outcome)  # its map over the photograph goes with this copy, before others have room
            result = to_response(upload, replace(answer, outcome=outcome), options)
            del outcome
        if keep and self.history is not None:
            verdict = Verdict(**{name: getattr(result, name) for name in Verdict.model_fields})
            loaded = answer.loaded
            version, picture = loaded.version, thumbnail(upload, loaded.model.preprocessing.white)
            try:
                result.id = self.history.add(time.time(), hosted.name, version, verdict, upload.content, picture)
            except OutputError as error:
                result.not_kept = str(error)
                self.counters.add("kizu_verdicts_not_kept_total", model=hosted.name)
                log.error("not kept", extra={"facts": {"model": hosted.name, "error": str(error)}})
        return result

    def _batch_counter(self, name: str) -> Callable[[int], None]:
        return lambda size: self.counters.observe("kizu_batch_size", size, model=name)


def _resident_bytes() -> float:
    """Bytes of memory in use, 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return 0.0
