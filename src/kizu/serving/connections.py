"""Connections: how many may stand, and how long one may stand without a request or without reading its answer."""

import asyncio
import functools
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ACCEPTED_AT_ONCE", "Connection", "allowed_connections", "protocol", "watch_over"]

MAX_CONNECTIONS = 1024
MIN_CONNECTIONS = 16
MAX_OPEN_FILES = 4096  # that the process asks for, where the system lets it
ACCEPTED_AT_ONCE = 32  # connections that asyncio takes before any of them can be looked at
RESERVED = 48 + 3 * ACCEPTED_AT_ONCE  # open files for models, the history, the log, and connections not looked at yet
HEADER_SECONDS = 10.0
READING_SECONDS = 30.0  # without a byte of the answer being taken


class Connection(H11Protocol):
    """A connection that gives way to a newer one while it waits for a request and there are too many."""

    def __init__(self, *arguments: Any, most: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._most = most
        self.waiting_since: float | None = None  # for the head of a request; None: one is being answered
        self._unread, self._unread_since = 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        if len(self.connections) > self._most:
            waiting = {
                other: other.waiting_since
                for other in self.connections
                if isinstance(other, Connection) and other.waiting_since is not None
            }
            oldest = min(waiting, key=waiting.__getitem__)  # this one at the latest
            oldest.transport.abort()
            oldest.waiting_since = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = self.loop.time()

    def is_stale(self) -> bool:
        """Whether it has waited too long: for the head of a request, or for its client to read. Asked now and again."""
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if unread != self._unread:
            self._unread, self._unread_since = unread, now
        if unread:
            return now - self._unread_since > READING_SECONDS
        return self.waiting_since is not None and now - self.waiting_since > HEADER_SECONDS


def protocol(most: int) -> Any:
    """What uvicorn makes a connection with, when at most so many may stand."""
    return functools.partial(Connection, most=most)


def allowed_connections() -> int:
    """How many connections the open files of this process allow; their number is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_OPEN_FILES if hard == unlimited else min(MAX_OPEN_FILES, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = MAX_OPEN_FILES if soft == unlimited else soft
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, files - RESERVED))


async def watch_over(server: uvicorn.Server, bound: socket.socket) -> None:
    """Close connections that are stale, for ever."""
    while not server.started:
        await asyncio.sleep(0.01)
    bound.listen(MAX_CONNECTIONS)  # these may wait to be accepted; asyncio had set the number that it takes at once
    while True:
        await asyncio.sleep(1)
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection) and connection.is_stale():
                connection.transport.abort()
