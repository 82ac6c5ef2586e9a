"""The server's socket, signals, time-outs of connections and log, each without a running server."""

import asyncio
import contextlib
import errno
import re
import signal
import socket
import sys
import time
from types import SimpleNamespace

import h11
import pytest

from longlora.errors import UserError
from longlora.serving import listen
from longlora.serving.log import USAGE, Log


def test_a_socket_is_bound_and_does_not_listen():
    with listen.bind("127.0.0.1", 0) as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.1" and port > 0 and bound.type == socket.SOCK_STREAM
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_out_of_range(port):
    with pytest.raises(UserError, match=f"^port should be from 0 to 65535, got {port}$"):
        listen.bind("127.0.0.1", port)


class Refusing:
    """A socket whose address is always taken."""

    made: list["Refusing"] = []

    def __init__(self, *kind):
        self.closed = False
        self.made.append(self)

    def setsockopt(self, *_):
        pass

    def bind(self, address):
        self.address = address
        raise OSError(errno.EADDRINUSE, "it is taken")

    def close(self):
        self.closed = True


def test_a_taken_port_is_named_and_its_socket_closed(monkeypatch):
    monkeypatch.setattr(socket, "socket", Refusing)
    monkeypatch.setattr(Refusing, "made", [])
    words = "^cannot listen at 127.0.0.1, port 65535: it is taken; --port 0 takes a free one$"
    with pytest.raises(UserError, match=words):
        listen.bind("127.0.0.1", 65535)
    (one,) = Refusing.made
    assert one.closed and one.address == ("127.0.0.1", 65535)


def test_a_host_without_an_address_is_named(monkeypatch):
    def nobody(*where, **how):
        assert where == ("nobody", 1) and how == dict(type=socket.SOCK_STREAM)
        raise socket.gaierror(socket.EAI_NONAME, "who is that")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", nobody)
        with pytest.raises(UserError, match="^cannot listen at nobody, port 1: who is that$"):
            listen.bind("nobody", 1)
    with pytest.raises(UserError, match="^cannot listen at a{99}, port 1: [^;]*label[^;]*$"):
        listen.bind("a" * 99, 1)  # Python's own error, which has no number


class Bound:
    """A socket that is bound to `name`."""

    def __init__(self, *name):
        self.name = name

    def getsockname(self):
        return self.name


def server(idle=lambda: False, bound=None):
    """A Server, and a list that grows with each call of drain."""
    drained = []
    made = listen.Server(None, bound or Bound("1.2.3.4", 5), lambda: drained.append(1), idle)
    return made, drained


def test_the_address_of_a_server():
    assert server()[0].url == "http://1.2.3.4:5"
    assert server(bound=Bound("::1", 5, 0, 0))[0].url == "http://[::1]:5"


def test_the_options_of_uvicorn():
    """No websockets, no start-up events, no changes to `logging`, and no name of the server in responses."""
    config = server()[0].config
    assert (config.http, config.ws, config.lifespan) == (listen._Protocol, "none", "off")
    assert (config.log_config, config.log_level, config.server_header) == (None, "error", False)
    assert config.backlog == listen.BACKLOG


def test_the_first_signal_drains_and_the_second_ends_the_server(monkeypatch):
    said = []
    monkeypatch.setattr(listen.os, "write", lambda file, text: said.append((file, text)))
    made, drained = server()
    made.handle_exit(signal.SIGTERM, None)
    assert drained == [1] and not made.should_exit and not made.force_exit
    ((file, text),) = said
    assert file == 2 and text.startswith(b"SIGTERM: finishing the answers") and text.endswith(b"\n")
    made.handle_exit(signal.SIGINT, None)
    assert drained == [1] and len(said) == 1 and made.should_exit and made.force_exit
    monkeypatch.setattr(listen.uvicorn.Server, "run", lambda self, sockets: said.append(sockets))
    with pytest.raises(SystemExit) as caught:
        made.run()
    assert caught.value.code == 130 and said[-1] == [made._bound]  # 128 + SIGINT, as in a shell
    server()[0].run()  # without a second signal it returns


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_without_standard_error(monkeypatch, closed):
    def write(file, text):
        assert not closed
        raise OSError(errno.EBADF, "it is closed")

    if closed:
        monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(listen.os, "write", write)
    made, drained = server()
    made.handle_exit(signal.SIGINT, None)
    assert drained == [1]


@pytest.mark.parametrize("draining, idle", [(False, False), (False, True), (True, False), (True, True)])
def test_a_draining_server_ends_when_it_is_idle(draining, idle):
    made, drained = server(lambda: idle)
    if draining:
        made.stop()
    assert drained == [1] * draining
    assert asyncio.run(made.on_tick(1)) is (draining and idle)
    assert made.should_exit is (draining and idle)


class Loop:
    """An event loop with a stopped clock, which records the calls that are scheduled."""

    def __init__(self):
        self.now, self.calls = 100.0, []

    def time(self):
        return self.now

    def call_later(self, seconds, function):
        call = SimpleNamespace(seconds=seconds, function=function, done=False)
        call.cancel = lambda: vars(call).update(done=True)
        call.cancelled = lambda: call.done
        call.when = lambda at=self.now + seconds: at
        self.calls.append(call)
        return call


@pytest.fixture
def protocol(monkeypatch):
    """A connection on a Loop. The methods that it inherits from uvicorn only record their names."""
    called = []
    names = "connection_made connection_lost data_received pause_writing resume_writing"
    for name in [*names.split(), "timeout_keep_alive_handler"]:
        monkeypatch.setattr(listen.H11Protocol, name, lambda *_, name=name: called.append(name))
    made = object.__new__(listen._Protocol)
    made.loop, made.conn, made.called = Loop(), SimpleNamespace(their_state=h11.IDLE), called
    closed = []
    made.transport = SimpleNamespace(
        close=lambda: closed.append(1), abort="abort", is_closing=lambda: bool(closed), closed=closed
    )
    made.connection_made(made.transport)
    return made


def test_a_connection_whose_head_is_late_is_closed(protocol):
    (head,) = protocol.loop.calls
    assert head.seconds == listen.HEAD_SECONDS and protocol.called == ["connection_made"]
    protocol.data_received(b"GET")
    assert len(protocol.loop.calls) == 1 and not head.done and protocol.called[-1] == "data_received"
    head.function()
    assert protocol.transport.closed == [1]
    last = protocol.loop.calls[-1]  # for a client that does not read the rest
    assert (last.seconds, last.function) == (listen.READ_SECONDS, "abort")
    head.function()
    assert protocol.transport.closed == [1]


def test_a_complete_head_stops_the_clock(protocol):
    (head,) = protocol.loop.calls
    protocol.conn.their_state = h11.SEND_BODY
    protocol.data_received(b"GET / HTTP/1.1\r\n\r\n")
    assert head.done
    head.function()
    assert not protocol.transport.closed
    protocol.conn.their_state = h11.IDLE  # the next one on the connection
    protocol.data_received(b"GET")
    assert [call.seconds for call in protocol.loop.calls] == [listen.HEAD_SECONDS] * 2
    protocol.loop.now += listen.HEAD_SECONDS
    protocol.data_received(b" ")
    assert len(protocol.loop.calls) == 3
    protocol.loop.now += listen.HEAD_SECONDS - 1
    protocol.data_received(b"/")
    assert len(protocol.loop.calls) == 3


def test_an_idle_connection_is_closed(protocol):
    protocol.timeout_keep_alive_handler()
    assert protocol.called[-1] == "timeout_keep_alive_handler" and protocol.transport.closed == [1]


def test_a_client_that_does_not_read_is_cut_off(protocol):
    protocol.resume_writing()
    protocol.pause_writing()
    head, read = protocol.loop.calls
    assert (read.seconds, read.function) == (listen.READ_SECONDS, "abort") and not read.done
    protocol.resume_writing()
    assert read.done and protocol.called[-3:] == ["resume_writing", "pause_writing", "resume_writing"]
    protocol.pause_writing()
    protocol.connection_lost(None)
    assert head.done and protocol.loop.calls[-1].done and protocol.called[-1] == "connection_lost"


def test_a_connection_may_end_before_anything_is_sent(protocol):
    protocol.connection_lost(None)
    assert protocol.loop.calls[0].done and protocol.called[-1] == "connection_lost"


def logged(capsys, status=200, method="POST", client=("1.2.3.4", 5), fails=False, **scope):
    """The line that the log writes of a request, without the time and the seconds; None if there is none."""

    async def app(scope, receive, send):
        if fails:
            raise KeyError
        await send(dict(type="http.response.start", status=status))
        await send(dict(type="http.response.body"))

    async def send(message):
        sent.append(message["type"])

    sent: list[str] = []
    scope = dict(method=method, path="/a\nb", client=client) | scope
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        asyncio.run(Log(app)(scope, None, send))
    assert sent == ([] if fails else ["http.response.start", "http.response.body"])
    line = capsys.readouterr().err
    if not line:
        return None
    return re.fullmatch(r"\d\d:\d\d:\d\d (.*), \d+\.\d\d s\n", line)[1]


def test_a_line_of_the_log(capsys):
    usage = dict(prompt_tokens=7, completion_tokens=5, prompt_tokens_details=dict(cached_tokens=3))
    wanted = r"1.2.3.4 POST /a\nb 200, prompt 7 tokens (3 reused), answer 5"
    assert logged(capsys, **{USAGE: lambda: usage}) == wanted
    assert logged(capsys) == r"1.2.3.4 POST /a\nb 200"
    assert logged(capsys, client=None) == r"- POST /a\nb 200"
    assert logged(capsys, 400, "GET") == r"1.2.3.4 GET /a\nb 400"
    assert logged(capsys, 399, "GET") is None and logged(capsys, method="GET") is None
    assert logged(capsys, fails=True) == r"1.2.3.4 POST /a\nb 500"


def test_the_time_and_the_seconds_in_the_log(capsys, monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "strftime", lambda form: form)

    async def app(scope, receive, send):
        pass

    asyncio.run(Log(app)(dict(method="POST", path="/"), None, None))
    assert capsys.readouterr().err == "%H:%M:%S - POST / 500, 2.50 s\n"
