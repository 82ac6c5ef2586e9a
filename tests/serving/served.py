"""A server of a tiny model in a thread of the test."""

import contextlib
import json
import threading

import tiny

import longlora

# Says nothing but what the messages say, so that tokens are easy to count.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% if m['name'] %}({{ m['name'] }}){% endif %}{{ tail }}\n{% endfor %}"
)


@contextlib.contextmanager
def serving(path, change=None, **how):
    """Serve a random model in `path`, made if it is not there -> the server. It has stopped at the end."""
    if not (path / "config.json").exists():
        tiny.model(path, max_position_embeddings=512, change=change)
        config = dict(eos_token="<|end|>", chat_template=TEMPLATE)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    begun, servers, failed = threading.Event(), [], []

    def ready(server):
        servers.append(server)
        begun.set()

    def run():
        try:
            longlora.serve(path, port=0, device="cpu", ready=ready, **how)
        except BaseException as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    if failed:
        raise failed[0]
    try:
        yield servers[0]
    finally:
        servers[0].stop()
        thread.join(20)
        assert not thread.is_alive() and not failed
