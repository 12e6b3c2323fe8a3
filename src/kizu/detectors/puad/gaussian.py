"""A normal distribution of global features: fitted to few images, distances from it, what deviates.

Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate Analysis 88
(2004). All in double precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ROUNDING", "Gaussian", "cross_fitted", "ledoit_wolf"]

ROUNDING = 1e-6  # of features in single precision: a smaller deviation is none


def ledoit_wolf(features: Tensor) -> tuple[Tensor, float]:
    """(N, D) → the shrunk covariance (D, D) = (1 − ρ) S + ρ μ I, and ρ.

    S is the sample covariance, μ = tr S / D; ρ = min(β², δ²) / δ² with δ² = ‖S − μI‖² and
    β² = Σ‖xₖxₖᵀ − S‖² / N² (§3.3), where Σ‖xₖxₖᵀ − S‖² = Σ‖xₖ‖⁴ − N‖S‖². Zero for features that are all the same.
    """
    count, dimension = features.shape
    centred = features.double() - features.double().mean(0)
    sample = centred.T @ centred / count
    mean_variance = sample.trace() / dimension
    spread = (sample - mean_variance * torch.eye(dimension, dtype=sample.dtype, device=sample.device)).square().sum()
    error = (centred.square().sum(1).square().sum() - count * sample.square().sum()) / count**2
    share = float((torch.minimum(error, spread) / spread).clamp(min=0)) if spread > 0 else 0.0
    shrunk = (1 - share) * sample
    shrunk.diagonal().add_(share * mean_variance)
    return shrunk, share


class Gaussian(nn.Module):
    """Mean and covariance of features; distances are Mahalanobis', √((x − μ)ᵀ Σ⁺ (x − μ)), Σ⁺ the pseudo-inverse.

    They are computed as ‖Σ⁺^½ (x − μ)‖ with the symmetric root, whose components stay as close to the features as
    uncorrelated ones can: so each says how much its own feature adds to the distance.
    """

    mean: Tensor
    root: Tensor
    shrinkage: float = 0.0

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("root", torch.zeros(dimension, dimension, dtype=torch.float64))

    @classmethod
    def fitted(cls, features: Tensor) -> "Gaussian":
        """To features (N, D) of good images, N ≥ 1."""
        gaussian = cls(features.shape[1]).to(features.device)
        gaussian.mean = features.double().mean(0)
        covariance, gaussian.shrinkage = ledoit_wolf(features)
        values, vectors = torch.linalg.eigh(covariance)
        least = values.max().clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        kept = values > torch.maximum(least, (ROUNDING * gaussian.mean).square().mean())
        factors = torch.where(kept, values, 1).rsqrt() * kept
        gaussian.root = (vectors * factors) @ vectors.T
        return gaussian

    @property
    def is_flat(self) -> bool:
        """Whether nothing varied, so that every distance is 0."""
        return not bool(self.root.any())

    def whitened(self, features: Tensor) -> Tensor:
        """(N, D) → uncorrelated deviations from the mean, in units of theirs (N, D)."""
        whitened: Tensor = (features.double() - self.mean) @ self.root
        return whitened

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) → distances (N,)."""
        distances: Tensor = self.whitened(features).norm(dim=1)
        return distances


def cross_fitted(features: Tensor, folds: Sequence[Tensor]) -> Tensor:
    """(N, D) → the distance of each image from a Gaussian that was fitted without the images of its fold (N,).

    `folds` are numbers of images. NaN for an image that is in none, or alone.
    """
    distances = torch.full((len(features),), torch.nan, dtype=torch.float64, device=features.device)
    for fold in folds:
        others = torch.ones(len(features), dtype=torch.bool, device=features.device)
        others[fold] = False
        if others.any():
            distances[fold] = Gaussian.fitted(features[others])(features[fold])
    return distances
