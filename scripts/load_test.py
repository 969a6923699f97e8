"""Load test of `deebert serve`: the same model with and without early exit, side by side.

Starts both servers, and lets clients send one text after the other, each waiting for its response. The servers
take turns. Prints requests per second and percentiles of the latency that the clients see.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from deebert.evaluation.tables import markdown, row
from deebert.utils.cli import ArgumentParser, DefaultsHelp, positive, positive_float, run
from deebert.utils.errors import InputError

ROOT = str(Path(__file__).parent.parent)


@contextmanager
def server(model: str, flags: Sequence[str]) -> Iterator[str]:
    """A server of its own process; gives its address, host:port. Raises InputError where it does not start."""
    command = [sys.executable, "-m", "deebert", "serve", "--model", model, "--port", "0", *flags]
    environment = os.environ | {"PYTHONPATH": ROOT}  # this checkout's package, in whatever folder this is run
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://([^/]+)", process.stdout.readline())
            if address is None:
                raise InputError(f"--model {model}: the server did not start")
            yield address[1]
        finally:
            process.terminate()
        if process.wait() != 0:
            raise InputError(f"--model {model}: the server ended with status {process.returncode}")


def client(address: str, texts: Sequence[str], until: float) -> list[float]:
    """Sends texts until that time (time.perf_counter). Returns the seconds to each response. Raises InputError."""
    seconds = []
    with closing(HTTPConnection(address, timeout=60)) as connection:
        for text in cycle(texts):
            start = time.perf_counter()
            if start > until:
                return seconds
            body = json.dumps({"texts": text})
            try:
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException) as error:
                raise InputError(f"http://{address}/predict: no response ({error or type(error).__name__})") from None
            if response.status != 200:
                raise InputError(f"status {response.status}: {content.decode()}")
            seconds.append(time.perf_counter() - start)


def load(address: str, texts: Sequence[str], clients: int, duration: float) -> tuple[list[float], float]:
    """The latencies, in seconds, of all requests that this many clients begin in this time; the time to the last one.

    Raises InputError.
    """
    start = time.perf_counter()
    until = start + duration
    shifted = (list(islice(cycle(texts), i, i + len(texts))) for i in range(clients))
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, address, own, until) for own in shifted]
        seconds = [future.result() for future in futures]
    if not all(seconds):
        raise InputError("a client got no response")
    return [value for values in seconds for value in values], time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=DefaultsHelp)
    parser.add_argument("--model", required=True, help="folder of a trained or an exported model")
    parser.add_argument("--file", required=True, type=Path, help="texts, one a line")
    parser.add_argument("--exit_threshold", required=True, type=float, help="of the server with early exit")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 64], help="clients at the same time")
    parser.add_argument("--seconds", type=positive_float, default=10, help="of each turn")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each server")
    args = parser.parse_args()
    try:
        texts = args.file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {args.file}: {error}") from None
    if not texts:
        raise InputError(f"--file {args.file}: no text in it")
    names = ("full model", f"early exit at {args.exit_threshold:g}")
    with (
        server(args.model, ["--exit_threshold=-1"]) as full,
        server(args.model, [f"--exit_threshold={args.exit_threshold}"]) as early,
    ):
        addresses = dict(zip(names, (full, early), strict=True))
        for address in addresses.values():
            load(address, texts, 2, 1)  # warm
        print(markdown([["clients", "server", "requests/s", "p50 ms", "p99 ms"]], left=2))
        for clients in args.clients:
            seconds: dict[str, list[float]] = {name: [] for name in names}
            elapsed = dict.fromkeys(names, 0.0)
            for _ in range(args.repeats):
                for name, address in addresses.items():
                    latencies, turn = load(address, texts, clients, args.seconds)
                    seconds[name] += latencies
                    elapsed[name] += turn
            for name, values in seconds.items():
                numbers = len(values) / elapsed[name], *(1000 * np.percentile(values, [50, 99]))
                print(row([str(clients), name, *(f"{number:.1f}" for number in numbers)]), flush=True)


if __name__ == "__main__":
    run(main)
