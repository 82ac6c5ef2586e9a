"""longlora serve: OpenAI's API and a page for a model, over HTTP."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from longlora.data.chat_template import ChatTemplate
from longlora.errors import UserError
from longlora.serving import pdf
from longlora.serving.answer import chat_ids
from longlora.serving.log import USAGE, Log
from longlora.serving.open import Opened
from longlora.serving.protocol import Limits, Refused, Wanted, read_chat, read_completion
from longlora.serving.replies import Reply, encoded
from longlora.serving.streams import PING_SECONDS, STOPPING, Answers, Gone, Stream
from longlora.serving.text import Spelling
from longlora.serving.worker import Choice, Worker

# A request's body may take BODY_SECONDS, plus one second for each BYTES_PER_SECOND that have come.
BODY_SECONDS, BYTES_PER_SECOND = 30.0, 32 << 10
# The limit of a body in bytes: SMALLEST_LIMIT, or if that is more, BYTES_PER_TOKEN times the context.
SMALLEST_LIMIT, BYTES_PER_TOKEN = 4 << 20, 64
DRAINED = 64 << 20  # bytes of a body over the limit that are read, so that the client hears why
MOST_COMING = 32  # requests, beyond those that have a place, whose bodies are read
MOST_PDFS = 4  # PDFs that come or wait to be converted; each may take pdf.LARGEST bytes
RETRY_SECONDS = 5
OPEN_PATHS = ("/", "/health")  # without the key


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, "application/json")


def refusal(error: Refused) -> Response:
    headers = {"retry-after": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return reply(error.body(), error.status, headers)


def _no_such_route(request: Request, error: Any) -> Response:
    """What Starlette raises, with its headers: the methods that a route has."""
    said = refusal(Refused(f"{request.method} {request.url.path}: {error.detail}", error.status_code))
    said.headers.update(error.headers or {})
    return said


class Service:
    """The routes of a server. any_host: whether clients may call this machine by any name."""

    def __init__(
        self,
        opened: Opened,
        template: ChatTemplate,
        limits: Limits,
        api_key: str | None = None,
        origins: Sequence[str] = (),
        any_host: bool = True,
    ):
        self._opened, self._template, self._limits = opened, template, limits
        self._key = None if api_key is None else api_key.encode()
        self._origins, self._any_host = frozenset(origins), any_host
        self._spelling = Spelling(opened.tokenizer)
        self._body_limit = max(SMALLEST_LIMIT, BYTES_PER_TOKEN * limits.context)
        # One at a time: a long text takes much more memory while it is tokenised.
        self._pool = ThreadPoolExecutor(1, "tokens")
        self._converting = asyncio.Semaphore(1)
        self._pdfs = 0  # that come, wait or are converted
        self._coming = 0  # requests whose bodies and texts take memory, but no place yet
        self._page, self._policy = _page()
        self._created = int(time.time())
        self.worker = Worker(opened.engine)
        self.app = self._starlette()

    def _starlette(self):
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/", self._models),
            Route("/v1/models/{name:path}", self._model),  # a name may have slashes, as those on the Hub
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/pdf", self._pdf, methods=["POST"]),
        ]
        middleware = [Middleware(Log), Middleware(_Guard, admit=self._admit)]
        if self._origins:
            allowed: dict[str, Any] = dict(allow_methods=["GET", "POST"], allow_headers=["*"])
            middleware.insert(1, Middleware(CORSMiddleware, allow_origins=list(self._origins), **allowed))
        handlers: dict[Any, Any] = {
            Refused: lambda request, error: refusal(error),
            UserError: lambda request, error: refusal(Refused(self._told(error))),
            HTTPException: _no_such_route,
            Gone: lambda request, error: Response(status_code=499),  # nobody reads it
            ClientDisconnect: lambda request, error: Response(status_code=499),
            Exception: lambda request, error: refusal(Refused("the server has failed", 500)),
        }
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    def _told(self, error):
        """What a user's error says, without the places of files on this machine."""
        for path in (self._opened.base.path, self._template.where):
            error = str(error).replace(path, os.path.basename(path))
        return error

    def _admit(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise Refused for a request that may not use the server.

        Without a key, a page of another site must not use the server through the browser of its visitor. A
        browser names the site of the page in Origin. It names the server in Host: a site may let a name of
        its own lead to this machine.
        """
        if self._key is not None:
            given = headers.get(b"authorization", b"")
            right = given[:7].lower() == b"bearer " and hmac.compare_digest(given[7:].strip(), self._key)
            if not right and path not in OPEN_PATHS and method != "OPTIONS":
                raise Refused("the API key is missing or wrong", 401, None, "invalid_api_key")
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._any_host and not _is_here(host):
            raise Refused(f"the host {host!r} is not served without --api-key", 403)
        origin = headers.get(b"origin", b"").decode("latin-1")
        same = origin.partition("://")[2] == host
        if origin and not same and not self._origins & {origin, "*"}:
            raise Refused(f"pages of {origin!r} are not let in; see --cors-origin", 403)

    async def _show_page(self, request: Request) -> Response:
        headers = {
            "content-security-policy": self._policy,
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return Response(self._page, 200, headers, "text/html")

    async def _health(self, request: Request) -> Response:
        if self.worker.stopping:
            raise Refused(STOPPING, 503)
        if not self.worker.alive:
            raise Refused("the engine has ended", 500)
        running, waiting = self._opened.engine.load
        return reply(dict(status="ok", running=running, waiting=waiting))

    async def _models(self, request: Request) -> Response:
        return reply(dict(object="list", data=[self._described()]))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._limits.model:
            raise Refused(f"there is no model {name!r} here", 404, "model", "model_not_found")
        return reply(self._described())

    def _described(self):
        return dict(
            id=self._limits.model,
            object="model",
            created=self._created,
            owned_by="longlora",
            max_model_len=self._limits.context,
        )

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def _answer(self, request: Request, read: Callable[[bytes, Limits], Wanted]) -> Response:
        if self._coming >= self._limits.choices + MOST_COMING:
            raise Refused("too many requests come at the same time", 429, None, "rate_limit_exceeded")
        self._coming += 1
        try:
            wanted = read(await self._read_body(request, self._body_limit), self._limits)
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self._pool, self._prompts, wanted)
        finally:
            self._coming -= 1
        return await self._submit(request, wanted, prompts)

    async def _submit(
        self, request: Request, wanted: Wanted, prompts: list[tuple[np.ndarray, str]]
    ) -> Response:
        answers = Answers(request, wanted.n * len(prompts))
        for index in range(answers.count):
            ids, _ = prompts[index // wanted.n]
            answers.choices.append(
                Choice(
                    self._opened,
                    index,
                    ids,
                    wanted.sampling_of(index % wanted.n),
                    self._room(wanted, len(ids)),
                    answers.put,
                    wanted.stop,
                    wanted.top_logprobs,
                    wanted.echo and wanted.top_logprobs is not None,
                )
            )
        requests = [choice.request for choice in answers.choices]
        made = Reply(
            wanted,
            self._limits.model,
            self._spelling,
            [prompts[index // wanted.n][1] for index in range(answers.count)],
            sum(len(ids) for ids, _ in prompts),
            lambda: sum(request.reused for request in requests[:: wanted.n]),
        )
        request.scope[USAGE] = made.usage
        if not self.worker.submit(requests):
            if self.worker.stopping:
                raise Refused(STOPPING, 503)
            raise Refused("all places are taken, and so is the queue", 429, None, "rate_limit_exceeded")
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(answers.watched())
            if wanted.stream:
                try:
                    begun = await answers.next(PING_SECONDS)
                except TimeoutError:
                    begun = []
                return Stream(answers, made, begun, stack.pop_all())
            while pieces := await answers.next():
                for piece in pieces:
                    made.add(piece)
        return reply(made.body())

    def _prompts(self, wanted: Wanted) -> list[tuple[np.ndarray, str]]:
        """The ids of each prompt, and the text that its answer begins with. Refused if one is too long."""
        tokenizer = self._opened.tokenizer
        if wanted.messages is not None:
            return [(self._checked(self._chat_ids(wanted), wanted), "")]
        found = []
        for prompt in wanted.prompts:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if wanted.keep_tokens is not None:
                ids = ids[-wanted.keep_tokens :]
            whole = isinstance(prompt, str) and wanted.keep_tokens is None
            ids = self._checked(ids, wanted)
            echo = "" if not wanted.echo else prompt if whole else tokenizer.decode(ids)
            found.append((ids, str(echo)))
        return found

    def _chat_ids(self, wanted):
        """The tokens of a conversation. Turns that do not fit are left out if the client has agreed."""
        messages = wanted.messages
        head = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))

        def ids(first):
            kept = [*messages[:head], *messages[first:]]
            return chat_ids(self._opened, self._template, kept, **wanted.template)

        found = ids(head)
        room = self._limits.context - (wanted.max_tokens or self._limits.context // 4)
        if not wanted.drop_turns or len(found) <= room:
            return found
        turns = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
        low, high = 0, len(turns) - 1
        while low <= high:  # the fewest turns to leave out: the more, the shorter
            middle = (low + high) // 2
            shorter = ids(turns[middle])
            if len(shorter) <= room:
                found, high = shorter, middle - 1
            else:
                low = middle + 1
        return found

    def _checked(self, ids, wanted):
        count, most = len(ids), self._limits.context
        if count + (1 if wanted.max_tokens is None else wanted.max_tokens) > most:
            asked = "" if wanted.max_tokens is None else f" and max_tokens is {wanted.max_tokens}"
            raise Refused(
                f"the prompt has {count} tokens{asked}: this is more than the maximum context length of "
                f"{most} tokens, prompt and answer together",
                param="prompt" if wanted.messages is None else "messages",
                code="context_length_exceeded",
            )
        return ids

    def _room(self, wanted, count):
        if wanted.max_tokens is not None:
            return wanted.max_tokens
        room = self._limits.context - count
        return room if self._limits.tokens is None else min(room, self._limits.tokens)

    async def _pdf(self, request: Request) -> Response:
        """Convert a PDF, the body of the request -> its text."""
        if self._pdfs >= MOST_PDFS:
            raise Refused("too many PDFs come at the same time", 429, None, "rate_limit_exceeded")
        self._pdfs += 1
        try:
            body = await self._read_body(request, pdf.LARGEST)
            async with self._converting:
                if await request.is_disconnected():
                    raise Gone
                return reply(dict(text=await pdf.convert(body)))
        finally:
            self._pdfs -= 1

    async def _read_body(self, request, limit):
        if self.worker.stopping:
            raise Refused(STOPPING, 503)
        loop, parts, size = asyncio.get_running_loop(), [], 0
        began = loop.time()
        try:
            async with asyncio.timeout(BODY_SECONDS) as timer:
                async for part in request.stream():
                    size += len(part)
                    timer.reschedule(began + BODY_SECONDS + size / BYTES_PER_SECOND)
                    if size <= limit:
                        parts.append(part)
                    elif size > DRAINED:
                        break
        except TimeoutError:
            raise Refused("the body of the request comes too slowly", 408) from None
        if size > limit:
            raise Refused(f"the body of the request has more than {limit} bytes", 413)
        return b"".join(parts)


class _Guard:
    """Refuses the requests that `admit` does not let in."""

    def __init__(self, app: Any, admit: Callable[[str, str, dict[bytes, bytes]], None]):
        self._app, self._admit = app, admit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        try:
            self._admit(scope["method"], scope["path"], dict(scope["headers"]))
        except Refused as error:
            app = refusal(error)
        await app(scope, receive, send)


def _is_here(host):
    """Whether a Host header is an address or localhost. No site on the internet has such a name."""
    name = re.sub(r":\d*$", "", host).strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _page() -> tuple[bytes, str]:
    """The page, and the Content-Security-Policy that lets it use its own script and style and this server."""
    page = resources.files("longlora.serving").joinpath("page.html").read_bytes()

    def hashed(tag):
        (found,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(found).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed(b'script')}; style-src {hashed(b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
