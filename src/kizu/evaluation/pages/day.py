"""What was judged in a day, or any time, on a page: how many, what was stopped, what was doubtful, what changed."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from kizu.calibration.captures import kind_of
from kizu.calibration.drift import DriftTest
from kizu.calibration.threshold import from_finite, interval, percent
from kizu.data import image
from kizu.data.preprocessing import shown
from kizu.errors import BadImage
from kizu.evaluation.pages.html import Figure, Page, Section, chart
from kizu.inference.verdict import Verdict

__all__ = ["Judged", "day_page", "drift_of", "finding"]

MAX_PICTURE_BYTES = 9_000_000  # of all pictures together
MAX_LISTED = 200  # photographs without a verdict


@dataclass(frozen=True)
class Judged:
    """A verdict that somebody kept, and where its photograph is."""

    verdict: Verdict
    time: datetime | None = None
    model: str = ""
    mark: str | None = None  # what a person said of the part: good or bad
    photograph: Callable[[], bytes | None] = lambda: None


def finding(judged: Sequence[Judged]) -> str:
    """The answer in a sentence."""
    counts = Counter(entry.verdict.verdict for entry in judged)
    total, stopped, errors = counts["pass"] + counts["stop"], counts["stop"], counts["error"] + counts["ask"]
    parts = "1 part" if total == 1 else f"{total:,} parts"
    sentences = (
        [f"{f'{stopped:,}' if stopped else 'None'} of {parts} {'were' if stopped > 1 else 'was'} stopped."]
        if total
        else []
    )
    if errors or not total:
        sentences.append(f"{errors:,} {'photograph' if errors == 1 else 'photographs'} could not be judged.")
    return " ".join(sentences)


def drift_of(judged: Sequence[Judged], calibration: Sequence[float]) -> DriftTest:
    """Whether these scores look like those that set the threshold; each photograph counts once for each score."""
    test = DriftTest(calibration)
    usual = [entry.verdict for entry in judged if _is_judged(entry)]
    scores = dict.fromkeys((verdict.image, verdict.score) for verdict in usual)
    for name, score in scores:
        if score is not None:
            test.add(name, score)
    return test


def _is_judged(entry: Judged) -> bool:
    """Whether a promise covers it."""
    return entry.verdict.verdict in ("pass", "stop") and not entry.verdict.cannot_judge


def day_page(
    judged: Sequence[Judged],
    title: str,
    command: str,
    *,
    drift: DriftTest | None = None,
    promise: str = "",
    max_pictures: int = 24,
) -> Page:
    """The page about verdicts in the order of their times.

    `drift` is what `drift_of` found; `promise` is the model's sentence. At most `max_pictures` of the stopped parts are
    shown, the most anomalous first, and half as many of the doubtful ones.
    """
    album = _Album()
    stopped = [entry for entry in judged if entry.verdict.verdict == "stop"]
    stopped.sort(key=lambda entry: -from_finite(entry.verdict.score))
    shown = stopped[:max_pictures]
    doubtful = _doubtful(judged, leave_out=shown)[: (max_pictures + 1) // 2]
    sections = [
        _hours(judged),
        _drift(drift) if drift is not None else None,
        _stopped(stopped, album.figures(shown)),
        _close(album.figures(doubtful)) if doubtful else None,
        _refused(judged),
        _not_judged([entry for entry in judged if entry.verdict.verdict in ("error", "ask")]),
    ]
    return Page(
        title=title,
        finding=finding(judged),
        lead=" ".join(filter(None, [_lead(judged), _marks(judged), promise])),
        sections=[section for section in sections if section is not None],
        command=command,
        caveats=album.remarks(),
    )


def _lead(judged: Sequence[Judged]) -> str:
    verdicts = [entry.verdict.verdict for entry in judged if entry.verdict.verdict in ("pass", "stop")]
    if not verdicts:
        return ""
    stopped = verdicts.count("stop")
    low, high = interval(stopped, len(verdicts))
    return (
        f"{percent(stopped / len(verdicts))} of the judged photographs were stopped. In the long run that is "
        f"{percent(low)} to {percent(high)}, with 95 % confidence."
    )


def _marks(judged: Sequence[Judged]) -> str:
    """What people said of the verdicts."""
    marks = Counter((entry.verdict.verdict, entry.mark) for entry in judged if entry.mark)
    if not marks:
        return ""
    return (
        f"Checked by people: {marks.total():,}. {marks['stop', 'good']:,} of the stopped parts were good, and "
        f"{marks['pass', 'bad']:,} of those that passed were defective."
    )


def _hours(judged: Sequence[Judged]) -> Section | None:
    """A row an hour, or a day where there are many hours."""
    times = [entry.time for entry in judged if entry.time is not None]
    if not times:
        return None
    spans_days = min(times).date() != max(times).date()
    name, pattern = ("day", "%Y-%m-%d") if spans_days else ("hour", "%H:00")
    groups: dict[str, list[Judged]] = {}
    for entry in judged:
        if entry.time is not None:
            groups.setdefault(entry.time.strftime(pattern), []).append(entry)
    rows = []
    for label, entries in groups.items():
        counts = Counter(entry.verdict.verdict for entry in entries)
        scores = [e.verdict.score for e in entries if e.verdict.score is not None and _is_judged(e)]
        rows.append(
            {
                name: label,
                "judged": str(counts["pass"] + counts["stop"]),
                "stopped": str(counts["stop"]),
                "not judged": str(counts["error"] + counts["ask"]),
                "median score": f"{statistics.median(scores):.4g}" if scores else "–",
            }
        )
    models = " and ".join(sorted({entry.model for entry in judged if entry.model}))
    by = f", judged by {models}" if models else ""
    return Section(f"{name.capitalize()} by {name}", f"{len(judged):,} photographs{by}.", rows)


def _drift(test: DriftTest) -> Section:
    evidence = [step.evidence for step in test.steps]
    marks = [(float(test.since + 1), "changed since")] if test.since is not None else []
    charts = (
        [
            chart(
                "Evidence for a change",
                "Powers of ten ↑: 2 is 100 to 1. Part after part →",
                [float(number) for number in range(1, len(evidence) + 1)],
                [evidence],
                across=[(test.alarm_evidence, "alarm")],
                down=marks,
            )
        ]
        if len(evidence) > 1
        else []
    )
    return Section("Do the parts still look the same?", test.sentence(), charts=charts)


def _stopped(stopped: Sequence[Judged], figures: Sequence[Figure]) -> Section:
    if not stopped:
        return Section("Stopped", "None.")
    left = len(stopped) - len(figures)
    more = "." if left <= 0 else f"; {left:,} more are not shown."
    return Section("Stopped", f"The most anomalous first{more}", figures=figures)


def _close(figures: Sequence[Figure]) -> Section:
    return Section(
        "Most doubtful",
        "Those whose scores are closest to the threshold, beside the stopped ones above. If you look at any photograph "
        "yourself, look at these.",
        figures=figures,
    )


def _refused(judged: Sequence[Judged]) -> Section | None:
    """How many photographs no promise covers, by reason, whatever became of them."""
    refused = [entry.verdict for entry in judged if entry.verdict.cannot_judge]
    counts = Counter((kind_of(verdict.cannot_judge), verdict.verdict) for verdict in refused)
    rows = [
        {"reason": reason, "photographs": str(count), "verdict": verdict}
        for (reason, verdict), count in counts.most_common()
    ]
    return Section("Taken otherwise than good photographs", "No promise covers them.", rows) if rows else None


def _not_judged(errors: Sequence[Judged]) -> Section | None:
    if not errors:
        return None
    verdicts = [entry.verdict for entry in errors[:MAX_LISTED]]
    rows = [{"photograph": verdict.image, "reason": verdict.error or verdict.cannot_judge} for verdict in verdicts]
    left = len(errors) - len(rows)
    return Section("Not judged", f"{left:,} more are not listed." if left else "And why.", rows)


def _doubtful(judged: Sequence[Judged], leave_out: Sequence[Judged]) -> list[Judged]:
    """The nearest to the threshold first, in units of how far a model's scores usually are from it."""
    distances: dict[int, float] = {}
    by_model: dict[str, list[Judged]] = {}
    for entry in judged:
        verdict = entry.verdict
        if verdict.score is not None and verdict.threshold is not None and _is_judged(entry):
            by_model.setdefault(entry.model, []).append(entry)
    for entries in by_model.values():
        raw = [abs(float(e.verdict.score or 0) - float(e.verdict.threshold or 0)) for e in entries]
        usual = statistics.median(raw) or 1.0
        distances |= {id(entry): distance / usual for entry, distance in zip(entries, raw, strict=True)}
    known = {id(entry) for entry in leave_out}
    candidates = [entry for entries in by_model.values() for entry in entries if id(entry) not in known]
    return sorted(candidates, key=lambda entry: distances[id(entry)])


class _Album:
    """Pictures for the page, as long as there is room for them."""

    def __init__(self) -> None:
        self.room = MAX_PICTURE_BYTES
        self.missing = self.dropped = 0

    def figures(self, entries: Sequence[Judged]) -> list[Figure]:
        return [Figure(self._picture(entry), *_caption(entry)) for entry in entries]

    def remarks(self) -> list[str]:
        """What a reader should know of the pictures that are not there."""
        remarks = []
        if self.missing:
            remarks.append(f"Of {self.missing:,} parts there is no photograph any more, or it was not found.")
        if self.dropped:
            remarks.append(f"{self.dropped:,} pictures were left out to keep this page below 10 MB.")
        return remarks

    def _picture(self, entry: Judged) -> str:
        """As a data URI, what is marked framed; empty where there is no photograph."""
        content = entry.photograph()
        try:
            photo = shown(content) if content else None
        except BadImage:
            photo = None
        if photo is None:
            self.missing += 1
            return ""
        small = image.small(photo)
        factor = small.shape[1] / photo.shape[1]
        regions = entry.verdict.regions
        frames = [tuple(round(factor * side) for side in region.box) for region in regions]
        boxes = [(left, top, wide, tall) for left, top, wide, tall in frames]
        uri = image.data_uri(image.framed(small, boxes, sum(region.matters for region in regions)))
        if len(uri) > self.room:
            self.dropped += 1
            return ""
        self.room -= len(uri)
        return uri


def _caption(entry: Judged) -> tuple[str, str, list[str]]:
    """The verdict, the kind of its colour, and further lines."""
    verdict = entry.verdict
    said = {"good": "a person said: good", "bad": "a person said: defective"}.get(entry.mark or "", "")
    when = "" if entry.time is None else f"{entry.time:%Y-%m-%d %H:%M:%S}"
    threshold = "" if verdict.threshold is None else f", stopped above {verdict.threshold:.4g}"
    p = "" if verdict.p_value is None else f"p {verdict.p_value:.3g}"
    size = next((str(region.size) for region in verdict.regions if region.matters and region.size), "")
    lines = [verdict.cannot_judge, f"score {verdict.score:.4g}{threshold}", p, size, when, verdict.image, said]
    return {"stop": "Stopped", "pass": "Passed"}[verdict.verdict], verdict.verdict, [line for line in lines if line]
