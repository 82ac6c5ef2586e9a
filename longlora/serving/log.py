"""The request log of the server."""

import sys
import time
from typing import Any

from longlora.errors import printable
from longlora.progress import quietly

USAGE = "longlora.usage"  # in the scope of a request: a function that returns what its answers used


class Log:
    """Middleware that writes one line to standard error for each POST and each refused request.

    A line gives the time, the client's address, the status and the seconds, and for an answer its tokens. It
    never contains the texts.
    """

    def __init__(self, app: Any):
        self._app = app
        self._say = quietly(lambda line: print(line, file=sys.stderr, flush=True))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        began, status = time.perf_counter(), 500

        async def watched(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if scope["method"] == "POST" or status >= 400:
                self._say(_line(scope, status, time.perf_counter() - began))


def _line(scope: Any, status: int, seconds: float) -> str:
    client = (scope.get("client") or ("-",))[0]
    line = f"{time.strftime('%H:%M:%S')} {client} {scope['method']} {printable(scope['path'])} {status}"
    if USAGE in scope:
        usage = scope[USAGE]()
        reused = usage["prompt_tokens_details"]["cached_tokens"]
        line += f", prompt {usage['prompt_tokens']} tokens ({reused} reused)"
        line += f", answer {usage['completion_tokens']}"
    return f"{line}, {seconds:.2f} s"
