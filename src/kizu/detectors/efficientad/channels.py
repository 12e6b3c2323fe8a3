"""Mean and deviation of each channel of feature maps."""

import torch
from torch import Tensor

__all__ = ["ChannelStatistics"]


class ChannelStatistics:
    """Mean and deviation of each channel over any number of batches, in one pass and double precision (Chan, 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """(B, C, h, w)."""
        values = features.transpose(0, 1).flatten(1).double()
        count, mean = values.shape[1], values.mean(1)
        total = self.count + count
        apart = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + values.sub(mean[:, None]).square().sum(1)
        self.squares += apart.square() * self.count * count / total
        self.mean = self.mean.to(mean) + apart * count / total
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and population deviation (C,), 1 for a channel that is constant; float32."""
        deviation = (self.squares / self.count).sqrt().float()
        return self.mean.float(), deviation.masked_fill(deviation < 1e-6, 1.0)
