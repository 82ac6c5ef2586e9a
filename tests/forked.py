"""Runs Python programs without the seconds that importing torch, transformers and PEFT takes.

`run` is subprocess.run for `python WORDS`, but the program is forked from a process that has imported these
packages, the server. Each program imports longlora anew. Ranks that a launcher of torch starts are forked
from the launcher.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

MODULES = (
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate.commands.launch",
)
server = None  # of this process, once it is needed; "here" in the server and in what it forks


def run(words, **how):
    """Run `python WORDS` with one thread -> subprocess.CompletedProcess, whose output is text."""
    return together([words], **how)[0]


def together(programs, env=(), cwd=".", timeout=1200):
    """Run programs side by side, as `run` does; the first that fails ends the others.

    env: what differs from the environment of this process."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "programs": [[str(word) for word in words] for words in programs],
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(env)},
            "cwd": os.path.abspath(cwd),
            "folder": folder,
            "timeout": timeout,
        }
        codes = forked(**asked) if server == "here" else ask(asked)
        if codes is None:
            raise subprocess.TimeoutExpired(programs, timeout)
        return [
            subprocess.CompletedProcess(
                words, code, *(file.read_text(errors="replace") for file in files_of(folder, i))
            )
            for i, (words, code) in enumerate(zip(programs, codes))
        ]


def files_of(folder, i):
    """The files of what program i prints."""
    return [Path(folder, f"{i}.{name}") for name in ("stdout", "stderr")]


def ask(request):
    """The answer of the server, which is started with the first request."""
    global server
    if server is None:
        server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        atexit.register(server.communicate)  # which ends it
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server has ended"
    return json.loads(answer)


# ---- in the server -------------------------------------------------------------------------------


class Forked:
    """`python WORDS` in a child: as much of subprocess.Popen as torch's launchers use."""

    def __init__(self, args, env, stdout=None, stderr=None, start_new_session=True, cwd="."):
        self.returncode, self.pid = None, os.fork()
        if self.pid:
            with contextlib.suppress(OSError):  # the child does it, too: one of them is first
                os.setpgid(self.pid, self.pid)
            return
        code = 1
        try:
            os.setpgid(0, 0)
            for number, file in ((1, stdout), (2, stderr)):
                if file:
                    os.dup2(file.fileno(), number)
            os.chdir(cwd)
            code = program(list(args[1:]), env)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            child, status = os.waitpid(self.pid, os.WNOHANG)
            if child:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode


def program(words, env):
    """Become `python WORDS` -> the exit code."""
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    while words[0] == "-u":
        del words[0]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def forked(programs, env, cwd, folder, timeout):
    """Run programs -> their exit codes; None if they take longer than `timeout` seconds."""
    children, end = [], time.monotonic() + timeout
    with contextlib.ExitStack() as held:
        for i, words in enumerate(programs):
            files = [held.enter_context(open(path, "w")) for path in files_of(folder, i)]
            children.append(Forked([sys.executable, *words], env, *files, cwd=cwd))
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        if any(child.poll() for child in children):
            break
        time.sleep(0.01)
    late = time.monotonic() >= end
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(60)
    return None if late else [child.returncode for child in children]


def serve():
    """Answer requests, one a line, until there are no more."""
    global server
    requests, answers, server = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), "here"
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.modules["forked"] = sys.modules["__main__"]
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module(
        "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    ).Popen = Forked
    for line in requests:
        print(json.dumps(forked(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
