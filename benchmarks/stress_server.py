"""Many clients against `longlora serve`: errors, growth of memory, and tokens a second against one client.

    python -m benchmarks.stress_server --model MODEL [--clients 32] [--seconds 120]

For the first quarter of the time one client asks, then all clients do. They send short questions, read some
answers whole and some as streams, close some streams early, and send some wrong requests. At the end one
conversation asks two questions about a long text. The script prints JSON.
"""

import argparse
import collections
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from longlora.guard import guarded

EXPECTED = {"answer", "stream", "left", "refused"}


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def post(address: str, body: dict) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Connection": "close"})
    return connection.getresponse()


class Clients:
    """Clients that ask side by side until a time, and what became of their requests."""

    def __init__(self, address: str, tokens: int):
        self._address, self._most = address, tokens
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.tokens, self._lock = 0, threading.Lock()

    def _ask(self, source: random.Random) -> tuple[str, int]:
        words = " ".join(source.choice(["river", "stone", "light", "seven", "open"]) for _ in range(20))
        body = dict(messages=[{"role": "user", "content": words}], max_tokens=self._most)
        kind = source.choice(["answer", "answer", "stream", "stream", "left", "refused"])
        if kind == "refused":
            response = post(self._address, body | dict(max_tokens="many"))
            return (kind if response.status == 400 else f"status {response.status}"), 0
        if kind == "answer":
            response = post(self._address, body)
            found = json.loads(response.read())
            if response.status != 200:
                return f"status {response.status}: {found['error']['message']}", 0
            return kind, found["usage"]["completion_tokens"]
        response = post(self._address, body | dict(stream=True, stream_options={"include_usage": True}))
        if response.status != 200:
            return f"status {response.status}", 0
        if kind == "left":
            lines = [response.readline() for _ in range(2 * source.randrange(1, 10))]
            response.close()
            return kind, len([line for line in lines if b"content" in line])
        events = response.read().decode().split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            return "a stream without its end", 0
        return kind, json.loads(events[-3][6:])["usage"]["completion_tokens"]

    def _run(self, seed: int, until: float) -> None:
        source = random.Random(seed)
        while time.monotonic() < until:
            try:
                outcome, tokens = self._ask(source)
            except (OSError, http.client.HTTPException, ValueError) as error:
                outcome, tokens = f"{type(error).__name__}: {error}", 0
            with self._lock:
                self.outcomes[outcome] += 1
                self.tokens += tokens

    def run(self, count: int, seconds: float) -> float:
        """Let `count` clients ask -> tokens a second."""
        began = time.monotonic()
        arguments = [(seed, began + seconds) for seed in range(count)]
        threads = [threading.Thread(target=self._run, args=args, daemon=True) for args in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.tokens / (time.monotonic() - began)


def conversation(address: str, words: int) -> dict[str, float]:
    """Ask two questions about a long text -> seconds to the first token of each answer, and tokens reused."""
    source = random.Random(0)
    text = " ".join(source.choice(["river", "stone", "light", "seven", "open"]) for _ in range(words))
    messages = [{"role": "user", "content": f"{text}\n\nWhat is this?"}]
    found = {}
    for name in ("first", "second"):
        body = dict(messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True})
        began = time.monotonic()
        response = post(address, body)
        said, seconds, usage = "", 0.0, {}
        for line in response:
            event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                said += choice["delta"].get("content") or ""
                if said or choice["finish_reason"]:
                    seconds = seconds or time.monotonic() - began
        found[name] = round(seconds, 3)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And why?"}]
    details = usage["prompt_tokens_details"]
    return found | dict(prompt_tokens=usage["prompt_tokens"], cached_tokens=details["cached_tokens"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress_server", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most [32]")
    parser.add_argument("--words", type=int, default=6000, help="of the long text [6000]")
    args = parser.parse_args(arguments)
    flags = ["--model", args.model, "--port", "0", "--rows", str(args.rows), "--context", str(args.context)]
    command = [sys.executable, "-m", "longlora", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            process.stdout.readline()
            address = process.stdout.readline().split()[0].removeprefix("http://")
            alone, together = Clients(address, args.tokens), Clients(address, args.tokens)
            one = alone.run(1, args.seconds / 4)
            warm = Clients(address, args.tokens)
            warm.run(args.clients, args.seconds / 12)  # every row has been written
            before = resident(process.pid)
            all_of_them = together.run(args.clients, args.seconds)
            after = resident(process.pid)
            spoken = conversation(address, args.words)
        finally:
            process.terminate()
    outcomes = alone.outcomes + warm.outcomes + together.outcomes
    found = dict(
        clients=args.clients,
        seconds=args.seconds,
        requests=sum(together.outcomes.values()),
        errors={name: count for name, count in outcomes.items() if name not in EXPECTED},
        tokens_a_second={"one client": round(one, 1), "all": round(all_of_them, 1)},
        mib_before=round(before),
        mib_after=round(after),
        exit_code=process.returncode,
        seconds_to_the_first_token=spoken,
    )
    print(json.dumps(found, indent=2))
    return 1 if found["errors"] or process.returncode else 0


if __name__ == "__main__":
    sys.exit(guarded(main, "stress_server"))
