"""Connections of the service with bounds: how many there are, and how long a client may take.

uvicorn bounds neither: a client that sends nothing, or half of a request, or never reads its response, would keep its
connection for ever; and once the process has no file descriptors left, asyncio writes a traceback for each further one.
"""

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

BACKLOG = 32  # connections that asyncio accepts in one turn; it accepts those of three before one can be closed
BURST = 1024  # connections that the operating system keeps meanwhile
SPARE_FILES = 3 * BACKLOG + 32  # file descriptors that are left for those of the turns, and for all else
FEWEST = 16  # connections, however few descriptors there are
LAST_SECONDS = 1.0  # of a client's deadline when the service ends


class BoundedConnection(H11Protocol):
    """One client's connection. seconds: for a request to arrive, from its beginning or from the response before it.

    The same holds for reading a response. A connection has a deadline while it waits for its client. Where there are
    `most` connections, the one that has waited longest makes room for a new one; if none waits, the new one is closed.
    """

    most: int
    seconds: float
    deadline: asyncio.TimerHandle | None = None

    @classmethod
    def with_limits(cls, most: int, seconds: float) -> type["BoundedConnection"]:
        """The class for uvicorn, which makes the connections."""
        most = max(FEWEST, min(most, open_files() - SPARE_FILES))
        return type(cls.__name__, (cls,), {"most": most, "seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._set_deadline()
        if len(self.connections) > self.most:
            waiting = (other for other in self.connections if other.deadline is not None and other is not self)
            closed = min(waiting, key=lambda other: other.deadline.when(), default=self)
            self.connections.discard(closed)
            closed.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self.seconds = LAST_SECONDS
        if self.deadline is not None:
            self._drop_deadline()
            self._set_deadline()

    def _set_deadline(self) -> None:
        """There is one unless a request has arrived whose response the client neither has nor fails to read."""
        cycle = self.cycle
        works = cycle is not None and not cycle.more_body and not cycle.response_complete
        if works and not self.flow.write_paused:
            self._drop_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def _drop_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Server(uvicorn.Server):
    """uvicorn's server, where a burst of connections waits its turn."""

    async def startup(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets)
        for each in sockets:
            each.listen(BURST)  # asyncio has set it to the number of one turn


def open_files() -> int:
    """How many file descriptors this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return 1 << 20 if limit < 0 else limit  # -1: no limit
