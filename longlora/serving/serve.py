"""longlora.serve and the command: opens a model and serves it."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.data.chat_template import find_template
from longlora.decoder.sampling import Sampling
from longlora.device import choose
from longlora.errors import UserError
from longlora.serving.open import open_engine
from longlora.serving.protocol import Limits

if TYPE_CHECKING:
    from longlora.serving.listen import Server

PathLike = str | os.PathLike[str]
KEY = "LONGLORA_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: PathLike,
    adapter: PathLike | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 4,
    queue: int = 64,
    api_key: str | None = None,
    cors_origin: Sequence[str] = (),
    served_model_name: str | None = None,
    max_new_tokens: int | None = None,
    context: int | None = None,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    chat_template: PathLike | None = None,
    device: str = "auto",
    ready: "Callable[[Server], None] | None" = None,
    **sampling: Any,
) -> None:
    """Serve a model over HTTP by OpenAI's API, with a page at /, until SIGINT or SIGTERM ends it.

    port: 0 takes a free one. rows: answers that advance side by side. queue: requests that may wait.
    api_key: what clients must give; by default the environment variable LONGLORA_API_KEY, if it is set.
    cors_origin: sites whose pages may use the server. served_model_name: by default the last part of
        the path.
    max_new_tokens: the most that an answer may have. sampling: fields of decoder.sampling.Sampling, for
        requests that leave them out; the temperature is 1 then, as in OpenAI's API.
    ready: is called with the server when it is about to listen: server.url, and server.stop(), which any
        thread may call.
    The other arguments are those of longlora.generate.

    UserError for a port that is taken, and for what longlora.generate refuses, before any weight is read.
    """
    try:
        from longlora.serving import listen
        from longlora.serving.server import Service
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'longlora[serve]'") from None
    defaults = {"temperature": 1.0, **sampling}
    Sampling(**defaults)
    _check(rows, queue, max_new_tokens)
    key, origins, local = _key(api_key), [_origin(origin) for origin in cors_origin], host in LOCAL
    with listen.bind(host, port) as bound:
        device, chosen = choose(device)
        opened = open_engine(
            model, adapter, context=context, rows=rows, dtype=dtype, cache_dtype=cache_dtype, device=device
        )
        opened.engine.queue, places = queue, opened.engine.cache.places
        template = find_template(opened.tokenizer, chat_template, adapter)
        name = served_model_name or Path(model if adapter is None else adapter).resolve().name
        limits = Limits(name, places, rows + queue, max_new_tokens, defaults)
        service = Service(opened, template, limits, key, origins, any_host=not local)
        server = listen.Server(service.app, bound, service.worker.stop, lambda: not service.worker.alive)
        bound.listen(listen.BACKLOG)  # clients wait from here on
        print(f"{chosen}; {name}: {rows} answers at a time, a context of {places} tokens each")
        if not local and key is None:
            print("warning: whoever reaches this machine can use the server; see --api-key", file=sys.stderr)
        print(f"{server.url} has the page, {server.url}/v1 is the base URL of the API", flush=True)
        service.worker.start()
        if ready is not None:
            ready(server)
        server.run()


def _check(rows, queue, max_new_tokens):
    numbers = dict(rows=(rows, 1), queue=(queue, 0), max_new_tokens=(max_new_tokens, 1))
    for name, (number, least) in numbers.items():
        if number is not None and (type(number) is not int or number < least):
            raise UserError(f"{name} should be an integer of at least {least}, got {number!r}")


def _key(given):
    """The API key, or None."""
    key = os.environ.get(KEY) if given is None else given
    if key is not None and (not key.isprintable() or not key.isascii() or key != key.strip() or not key):
        raise UserError(
            f"the API key should be printable ASCII without spaces around it; unset {KEY} for none"
        )
    return key


def _origin(given):
    if given != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", given):
        raise UserError(f"cors_origin should be * or like https://example.org, got {given!r}")
    return given
