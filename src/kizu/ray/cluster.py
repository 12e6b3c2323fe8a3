"""A Ray cluster to work on: one that runs already, or one of this machine alone, which ends with the command."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kizu.errors import OptionError, require
from kizu.inference.processor import cores

__all__ = ["LOCAL", "check_address", "cluster"]

LOCAL = "local"
STORE_BYTES = 2**30  # of Ray's object store on this machine: a model passes through it, and no photograph does
PATIENCE = 10.0  # seconds
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's switch, whose 0 keeps it to 127.0.0.1 on every system


def check_address(address: str) -> str:
    """The address of a cluster. Raises `OptionError` for what is none."""
    if address in (LOCAL, "auto") or re.fullmatch(r"[\w.\[\]:-]+:\d+", address):
        return address
    raise OptionError(
        f"`ray={address}`: a cluster's address is HOST:PORT, auto for the one that this machine belongs to, or "
        "local for a new one; without an address this setting stands behind the photographs"
    )


@contextmanager
def cluster(address: str = "") -> Iterator[Any]:
    """The module ray, connected to a cluster; to the one that this process is connected to, if it is.

    Without an address, the one that RAY_ADDRESS names, and otherwise a new one: of this machine alone, listening on
    127.0.0.1 only, without a dashboard. It ends with the context. Raises `OptionError` where no cluster answers, and
    `MissingExtra` without Ray.
    """
    address = check_address(address or os.environ.get("RAY_ADDRESS", "") or LOCAL)
    if address == LOCAL:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks are in its own files, not in the terminal
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns of a change to come
    ray = require("ray")
    if ray.is_initialized():
        yield ray
        return
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        settings |= {"num_cpus": cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        with _silence():
            _reach(address)
            ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"`ray={address}`: no Ray cluster answers there ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `OSError` where nothing listens at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error while Ray's part in C++ starts, which writes there what it raises too."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
