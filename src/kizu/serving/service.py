"""What a server does, whatever the protocol: judge uploads, keep verdicts, collect feedback, follow its models."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kizu.errors import BadImage, KizuError
from kizu.inference.verdict import Verdict
from kizu.serving.batcher import Answer, Loaded, Microbatcher, QueueFull, Upload
from kizu.serving.feedback import Label, collect
from kizu.serving.history import Journal
from kizu.serving.hosted_model import Served, read_model
from kizu.serving.logbook import log
from kizu.serving.observability import Counters, Sample
from kizu.serving.responses import Wishes, judged, thumbnail
from kizu.serving.schemas import Collected, Judged, Predictions
from kizu.serving.uploads import Limits, Refusal, check, refusal_of

__all__ = ["Service"]

LOOK = 1.0  # seconds between looks for replaced folders


class Service:
    """Models on duty and what is kept of their work. Close it at the end: it answers what waits."""

    def __init__(
        self, folders: Mapping[str, Path], limits: Limits, *, store: Path, keep: int = 0, batch: int = 8
    ) -> None:
        """Read the models in `folders`. Raises `KizuError` where one of them, or what is kept, cannot be read."""
        self.limits = limits
        self.store = store
        self.counters = Counters()
        self.journal = Journal(store / "verdicts.sqlite", keep) if keep else None
        self.models: dict[str, Served] = {}
        for name, folder in folders.items():
            loaded, stamp = read_model(folder)
            queue = Microbatcher(loaded, room=limits.images, batch=batch, seen=self._batch_seen(name))
            self.models[name] = Served(name, folder, queue, stamp)

    def pick(self, name: str | None) -> Served:
        """A model by its name, or the only one. Raises `Refusal`."""
        names = ", ".join(self.models)
        if name is None and len(self.models) > 1:
            raise Refusal(422, f"Say which model, as in model={next(iter(self.models))}; there are: {names}")
        found = next(iter(self.models.values())) if name is None else self.models.get(name)
        if found is None:
            raise Refusal(404, f"There is no model {name}; there are: {names}")
        return found

    async def predict(self, served: Served, uploads: Sequence[Upload], wishes: Wishes, keep: bool) -> Predictions:
        """Verdicts on uploads, in their order.

        Raises `Refusal`: as `check` does where no upload is usable, 429 with a full queue, 503 where it takes too long.
        """
        refused = await asyncio.to_thread(self._check, uploads)
        usable = [upload for upload, problem in zip(uploads, refused, strict=True) if problem is None]
        answers = iter(await self._answers(served, usable, wishes.why) if usable else [])
        loaded = served.loaded
        results: list[Judged] = []
        for upload, problem in zip(uploads, refused, strict=True):
            if problem is None:
                answer = next(answers)
                loaded = answer.loaded
                if isinstance(answer.outcome, BadImage):
                    problem = refusal_of(upload.name, answer.outcome)
            if problem is not None and len(uploads) == 1:
                raise problem
            if problem is not None:
                results.append(Judged(image=upload.name, verdict="error", error=str(problem)))
            else:
                results.append(await asyncio.to_thread(self._finish, served, upload, answer, wishes, keep))
            self.counters.add("kizu_verdicts_total", model=served.name, verdict=results[-1].verdict)
        if problem is not None and all(result.verdict == "error" for result in results):
            raise Refusal(problem.status, "; ".join(result.error for result in results))
        return Predictions(model=served.name, version=loaded.version, results=results)

    async def reload(self, served: Served) -> Loaded:
        """Read a model again. Raises `Refusal` where that fails; the old one then stays."""
        start = time.perf_counter()
        try:
            loaded = await asyncio.to_thread(served.reload)
        except (KizuError, OSError) as error:
            self.counters.add("kizu_reloads_total", model=served.name, outcome="failed")
            log.error("reload failed", extra={"facts": {"model": served.name, "error": str(error)}})
            raise Refusal(409, f"The model on duty stays, because the new one cannot be used: {error}") from None
        self.counters.add("kizu_reloads_total", model=served.name, outcome="done")
        seconds = round(time.perf_counter() - start, 3)
        log.info("reloaded", extra={"facts": {"model": served.name, "version": loaded.version, "seconds": seconds}})
        return loaded

    async def follow(self) -> None:
        """Reload models whose folders were replaced, for ever."""
        while True:
            await asyncio.sleep(LOOK)
            for served in self.models.values():
                if await asyncio.to_thread(served.was_replaced):
                    try:
                        await self.reload(served)
                    except Refusal:
                        served.give_up_on()

    def collect(self, served: Served, uploads: Sequence[Upload], label: Label, number: int | None) -> Collected:
        """Write what a person marked; `number` is its verdict's, if that is kept. Raises `Refusal`."""
        folder = self.store / "feedback" / served.name
        for upload in uploads:
            check(upload, self.limits)
        try:
            files = [str(collect(folder, upload, label)) for upload in uploads]
        except BadImage as error:
            raise refusal_of(uploads[0].name, error) from None
        if number is not None and self.journal is not None:
            self.journal.mark(number, label)
        self.counters.add("kizu_feedback_total", model=served.name, label=label)
        good, bad = (sum(1 for _ in (folder / kind).glob("*")) for kind in ("good", "bad"))
        return Collected(files=files, good=good, bad=bad)

    def gauges(self) -> list[Sample]:
        """What is true now."""
        found = [Sample("kizu_memory_bytes", _resident())]
        for name, served in self.models.items():
            found.append(Sample("kizu_queue_length", len(served.queue), {"model": name}))
            found.append(Sample("kizu_model_loaded_seconds", served.loaded.time, {"model": name}))
        return found

    def close(self) -> None:
        for served in self.models.values():
            served.queue.close()
        if self.journal is not None:
            self.journal.close()

    def _check(self, uploads: Sequence[Upload]) -> list[Refusal | None]:
        found: list[Refusal | None] = []
        for upload in uploads:
            try:
                check(upload, self.limits)
                found.append(None)
            except Refusal as problem:
                found.append(problem)
        return found

    async def _answers(self, served: Served, uploads: Sequence[Upload], explain: bool) -> list[Answer]:
        try:
            futures = served.queue.submit(uploads, explain=explain)
        except QueueFull as error:
            raise Refusal(429, f"{error}: come again in a second") from None
        try:
            async with asyncio.timeout(self.limits.seconds):
                return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        except TimeoutError:
            raise Refusal(503, f"There was no verdict within {self.limits.seconds:g} seconds") from None

    def _finish(self, served: Served, upload: Upload, answer: Answer, wishes: Wishes, keep: bool) -> Judged:
        """The answer as it is sent, kept where verdicts are."""
        found = judged(upload, answer, wishes)
        if keep and self.journal is not None:
            plain = Verdict(**{name: getattr(found, name) for name in Verdict.model_fields})
            row = time.time(), served.name, answer.loaded.version, plain, upload.content, thumbnail(upload)
            found.id = self.journal.add(*row)
        return found

    def _batch_seen(self, name: str) -> Callable[[int], None]:
        return lambda size: self.counters.observe("kizu_batch_size", size, model=name)


def _resident() -> float:
    """Bytes of memory in use, 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return 0.0
