"""The answers to one request as they come, and the client that waits for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from longlora.serving.protocol import Refused
from longlora.serving.replies import Reply, event
from longlora.serving.worker import Choice, Piece

PING_SECONDS = 10.0  # between signs of life in a stream that waits for a token
PING = b": waiting\n\n"
STOPPING = "the server is stopping"


class Gone(Exception):
    """The client has gone."""


class Answers:
    """The pieces of the answers to one request, and the client that waits for them."""

    def __init__(self, request: Request, count: int):
        self.choices: list[Choice] = []
        self.count = self._left = count
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._receive = request.receive

    def put(self, piece: Piece) -> None:
        """Called by the thread of the engine."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def _watch(self):
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While entered, `next` notices that the client has gone. At the end nothing runs any more."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            for choice in self.choices:
                choice.request.cancel()

    async def next(self, seconds: float | None = None) -> list[Piece]:
        """The pieces that there are, at least one; none after the last one of every answer.

        Gone, Refused for an answer that failed, TimeoutError.
        """
        if not self._left:
            return []
        async with asyncio.timeout(seconds):
            found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        pieces = []
        for piece in found:
            if piece is None:
                raise Gone
            if piece.reason == "refused":
                raise Refused(STOPPING, 503)
            if piece.reason == "error":
                raise Refused(piece.error or "", 500)
            self._left -= piece.reason is not None
            pieces.append(piece)
        return pieces


class Stream(Response):
    """Server-sent events. begun: the first pieces, if they were waited for."""

    def __init__(self, answers: Answers, made: Reply, begun: list[Piece], stack: contextlib.AsyncExitStack):
        super().__init__(headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._answers, self._made, self._begun, self._stack = answers, made, begun, stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(Gone):
                async for part in self._parts():
                    if part:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _parts(self):
        """The parts of the stream. Pieces that are ready together are one part."""
        made, pieces = self._made, self._begun
        yield b"".join(made.beginning())
        try:
            while True:
                yield b"".join(part for piece in pieces for part in made.events(piece))
                if made.complete:
                    break
                try:
                    pieces = await self._answers.next(PING_SECONDS)
                except TimeoutError:
                    pieces = []
                    yield PING
        except Refused as error:
            yield event(error.body())
            return
        yield b"".join(made.end())
