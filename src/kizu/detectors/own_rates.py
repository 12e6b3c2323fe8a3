"""Zones with a promise of their own: each stops no more good parts than its own rate says."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kizu.calibration.threshold import calibrate, refuse
from kizu.config import Config
from kizu.detectors.fitting import FitResult
from kizu.errors import OptionError
from kizu.features.anomaly_map import upsampling_of

__all__ = ["with_own_rates"]

LEAST = 1e-3  # of the others' threshold: a zone that may stop nearly all good parts is stopped above that


@torch.inference_mode()
def with_own_rates(result: FitResult, config: Config, groups: Sequence[int] | None) -> FitResult:
    """The result with the zones of a config that have a rate of their own in units in which one threshold keeps it.

    The zones without one give the threshold, at the rate for all; without any, it is 1. A zone with one is stretched so
    that the threshold that its own scores give lies there too. `groups` numbers the images that belong together.
    Raises `OptionError` for a method that cannot score a zone alone, and where too few images carry a rate.
    """
    rates = config.own_rates
    if not rates:
        return result
    upsample, again = upsampling_of(result.graph), result.again
    if again is None or upsample is None or upsample.zones is None:
        raise OptionError(
            "`zones` with rates of false alarms of their own: there must be several, and the method PatchCore with one "
            "backbone, SimpleNet or EfficientAD"
        )

    def scores(zones: Sequence[int]) -> list[float]:
        upsample.only = frozenset(zones)
        try:
            return again().of_groups(groups).scores
        finally:
            upsample.only = None

    others = [number for number in range(int(upsample.zones.max()) + 1) if number not in rates]
    threshold = max(calibrate(scores(others), config.false_alarms).value, LEAST) if others else 1.0
    for number, rate in rates.items():
        good = scores([number])
        refuse(rate, len(good))
        upsample.stretch(number, max(calibrate(good, rate).value / threshold, LEAST))
    final = again().of_groups(groups)
    return replace(final, facts=result.facts, loo_scores=result.loo_scores, again=None, level=threshold)
