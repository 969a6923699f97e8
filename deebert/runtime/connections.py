"""Connections of the service with bounds: how many there are, and how long a request may take to arrive.

uvicorn bounds neither: a client that sends nothing, or half of a request, would keep its connection for ever, and once
the process has no file descriptors left, asyncio writes a traceback for each further one.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

BACKLOG = 32  # connections that asyncio accepts in one turn; it accepts those of three before one can be closed
SPARE_FILES = 3 * BACKLOG + 32  # file descriptors that are left for these and for all else


class BoundedConnection(H11Protocol):
    """One client's connection. seconds: within these a request's header and body have to arrive.

    Where there are `most` connections, the one that has sent no request for the longest time makes room for a new one;
    if there is none, the new one is closed. At a shutdown, requests that have not arrived are given up.
    """

    most: int
    seconds: float

    @classmethod
    def with_limits(cls, most: int, seconds: float) -> type["BoundedConnection"]:
        """The class for uvicorn, which makes the connections."""
        return type(cls.__name__, (cls,), {"most": most, "seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.deadline: asyncio.TimerHandle | None = None
        if len(self.connections) >= min(self.most, open_files() - SPARE_FILES):
            silent = [other for other in self.connections if other.cycle is None and other.deadline is not None]
            if not silent:
                self.transport = transport
                transport.abort()
                return
            longest = min(silent, key=lambda other: other.deadline.when())
            self.connections.discard(longest)
            longest.transport.abort()
        super().connection_made(transport)
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._stop_deadline()
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def _start_deadline(self) -> None:
        if self.deadline is None:
            self.deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def open_files() -> int:
    """How many file descriptors this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return 1 << 20 if limit < 0 else limit  # -1: no limit
