"""The same work on a Ray cluster; needs the extra `kizu[ray]`."""

from kizu.ray.judging import judge

__all__ = ["judge"]
