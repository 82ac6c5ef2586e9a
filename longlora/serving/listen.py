"""Listening for HTTP: the socket, connections that take too long, and signals that end the server."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from longlora.errors import UserError

# Seconds until the head of a request must be there, and until a client must have read what it was sent.
HEAD_SECONDS, READ_SECONDS = 20.0, 60.0
BACKLOG = 128  # connections that the system holds until they are taken


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet. port: 0 takes a free one. UserError if it is taken."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"port should be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        hint = "; --port 0 takes a free one" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        raise UserError(f"cannot listen at {host}, port {port}: {why}{hint}") from None
    return bound


class _Protocol(H11Protocol):
    """HTTP with time-outs: uvicorn has none for the head of a request, nor for clients that do not read."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, self._too_late)
        self._read: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head.cancel()
        elif self._head.cancelled() or self._head.when() <= self.loop.time():
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _too_late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._close()

    def _close(self) -> None:
        """Close the connection, also if the client never reads what it has been sent."""
        self.transport.close()
        self.loop.call_later(READ_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read is not None:
            self._read.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        if self._read is not None:
            self._read.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Serves `app` on a bound socket until `drain` has been called and `idle()` is true.

    SIGINT and SIGTERM call `drain`, which should end what runs. The server answers in the meantime, to refuse
    what comes. A second signal ends it at once, by a SystemExit.
    """

    def __init__(self, app: Any, bound: socket.socket, drain: Callable[[], None], idle: Callable[[], bool]):
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                server_header=False,
                backlog=BACKLOG,
            )
        )
        self._bound, self._drain, self._idle, self._draining = bound, drain, idle, False
        self._forced: int | None = None

    @property
    def url(self) -> str:
        host, port = self._bound.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: Any = None) -> None:
        super().run([self._bound])
        if self._forced is not None:
            raise SystemExit(128 + self._forced)

    def stop(self) -> None:
        """End the server, when what runs has finished. Any thread may call it."""
        self._draining = True
        self._drain()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self._draining:
            self.stop()
            text = f"{signal.Signals(sig).name}: finishing the answers that run; a second signal ends them\n"
            # The signal may have interrupted print, and standard error may be closed.
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
        else:
            self.should_exit = self.force_exit = True
            self._forced = sig

    async def on_tick(self, counter: int) -> bool:
        if self._draining and self._idle():
            self.should_exit = True
        return await super().on_tick(counter)
