"""PUAD: another method scores what can be pointed at; what cannot be, the features of the whole image tell.

Sugawara & Imamura, "PUAD: Frustratingly Simple Method for Robust Anomaly Detection", ICIP 2024.

In the order of the paper's §2:

1. The structural score is that of another method, `PUADGraph.base`; in the paper, EfficientAD's.
2. The logical score is the Mahalanobis distance √((x − μ)ᵀ Σ⁻¹ (x − μ)) of the mean feature: `gaussian.Gaussian`
3. Both are put in deviations of validation images above their mean: `PUAD._standardise`
4. The anomaly score is their sum: `PUADGraph.contributions`

One pass of the network gives map, score and feature. Beyond the paper, and switchable: any method under it, a balance,
and a gate whose threshold good images alone set (`gate`).
"""

from kizu.detectors.puad.detector import PUAD

__all__ = ["PUAD"]
