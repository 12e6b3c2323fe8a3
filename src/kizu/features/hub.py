"""The model hub that timm downloads weights from: whether it answers, and how not to wait where it does not."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["address", "answers", "impatient"]

TIMEOUT = 3.0  # seconds


def address() -> tuple[str, int]:
    """Host and port."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    return endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443)


def answers() -> bool:
    """Whether the hub can be reached. Only a connection is opened."""
    try:
        with socket.create_connection(address(), timeout=TIMEOUT):
            return True
    except OSError:
        return False


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, a hub that does not answer is not asked, because its client would try for a minute. Its cache still is.

    Behind a proxy the hub is always asked: a connection would only show that the proxy answers.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (getproxies() or answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
