"""Hostile clients of a running service: it goes on, in bounds. With -s the tests print what they measured."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from threading import Event, Thread

import pytest
from support.saved import TEXTS
from support.serving import connect, cpu_seconds, end, health_seconds, post, resident_mb, server

from deebert import Classifier
from deebert.commands.serve import SECONDS_TO_FINISH

pytestmark = pytest.mark.slow
REQUESTS, CLIENTS = 2_000, 16  # docs/reliability.md has the numbers of 20,000
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
HALF = HEAD % 1000 + b"{"  # a body that never ends
MEGABYTES = {  # bodies just below the default limit
    "500,000 numbers": b'{"texts": [' + b",".join([b"1"] * 500_000) + b"]}",
    "340,000 lists": b'{"texts": [' + b",".join([b"[]"] * 340_000) + b"]}",
    "100,000 keys": b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
    "500,000 thresholds": b'{"texts": "a", "exit_threshold": [' + b",".join([b"1"] * 500_000) + b"]}",
}
BAD = (  # body and status
    *((b'{"texts": [1, "a"]}', 422), (b'{"texts": []}', 422), (b'{"text": "a"}', 422), (b"{", 400), (b"\xff", 400)),
    *((b"[" * 5000, 400), (b'{"texts": "a", "exit_threshold": "x"}', 422), (b'{"texts": "\\ud800"}', 422)),
    *((b'{"texts": ["a", ["b", "c"]]}', 422), (json.dumps({"texts": ["a"] * 300}).encode(), 413)),
)


@pytest.fixture(scope="module")
def folder(exports) -> str:
    """An export: its service starts in a second."""
    return str(exports["bert"] / "export")


@contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """The seconds that /health takes meanwhile, again and again."""
    seconds, done = [], Event()

    def watch() -> None:
        while not done.wait(0.01):
            seconds.append(health_seconds(port))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()
    assert seconds


def test_bodies_of_a_megabyte(folder):
    with server(folder) as (process, port):
        post(port, {"texts": TEXTS})
        for name, body in MEGABYTES.items():
            memory, cpu = resident_mb(process), cpu_seconds(process)
            with watched(port) as seconds, ThreadPoolExecutor(10) as pool:
                statuses = {status for status, _ in pool.map(lambda _, body=body: post(port, body), range(10))}
            memory, cpu = resident_mb(process) - memory, (cpu_seconds(process) - cpu) / 10
            print(f"10 of {name}: health {max(seconds):.2f} s, CPU {cpu:.2f} s each, memory {memory:+.0f} MB")
            assert statuses <= {413, 422}
            assert cpu < 0.3
            assert memory < 100
        memory, long_text = resident_mb(process), {"texts": "good film " * 100_000}
        with watched(port) as seconds, ThreadPoolExecutor(6) as pool:
            assert {status for status, _ in pool.map(lambda _: post(port, long_text), range(6))} == {200}
        memory = resident_mb(process) - memory
        print(f"6 texts of a megabyte: health {max(seconds):.2f} s, memory {memory:+.0f} MB")
        assert memory < 400  # 100 for each that is tokenized at the same time
        end(process)


@pytest.mark.parametrize(
    "sent", [b"", HALF, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"], ids=["nothing", "body", "second"]
)
def test_more_waiting_connections_than_files(folder, sent):
    with server(folder, files=600) as (process, port), ExitStack() as stack:
        post(port, {"texts": TEXTS})
        start = time.perf_counter()
        for _ in range(700):
            stack.enter_context(connect(port, sent))
        waited = time.perf_counter() - start
        seconds = health_seconds(port)
        assert post(port, {"texts": TEXTS})[0] == 200
        ended = end(process)
    print(f"700 connections that sent {sent!r} in {waited:.1f} s: health {1000 * seconds:.0f} ms, end {ended:.1f} s")
    assert ended < SECONDS_TO_FINISH


def test_clients_that_read_no_response(folder):
    body = json.dumps({"texts": ["good film"] * 256}).encode()
    with server(folder, "--max_connections", "32", "--max_seconds", "2") as (process, port), ExitStack() as stack:
        for _ in range(40):
            with suppress(OSError):  # the service reads no further request of a client that takes no response
                client = stack.enter_context(connect(port))
                client.settimeout(0.2)
                client.sendall((HEAD % len(body) + body) * 20)
        start = time.perf_counter()
        while time.perf_counter() < start + 60:
            with suppress(OSError):
                health_seconds(port)
                break
        seconds = time.perf_counter() - start
        with suppress(OSError):
            client = stack.enter_context(connect(port))
            client.settimeout(0.2)
            client.sendall((HEAD % len(body) + body) * 100)
        ended = end(process)
    print(f"40 clients that read nothing, of 32: health after {seconds:.1f} s, end {ended:.1f} s")
    assert ended < SECONDS_TO_FINISH


def test_a_request_that_does_not_arrive_is_given_up(folder):
    with server(folder, "--max_seconds", "1") as (process, port):
        for sent in (b"", b"POST /pre", HALF):
            with closing(connect(port, sent)) as client, suppress(ConnectionResetError):
                assert client.recv(100) == b""
        with closing(connect(port, HALF)):
            health_seconds(port)
            assert end(process) < SECONDS_TO_FINISH


def test_half_sent_bodies_take_little_memory(folder):
    with server(folder) as (process, port), ExitStack() as stack:
        post(port, {"texts": TEXTS})
        before = resident_mb(process)
        for _ in range(300):
            stack.enter_context(connect(port, HEAD % 1_000_000 + bytes(900_000)))
        health_seconds(port)
        memory = resident_mb(process) - before
        print(f"300 bodies, sent to 90 %: memory {memory:+.0f} MB")
        assert memory < 150  # 32 bodies at the default limit, and what the connections have read
        end(process)


def test_many_requests_with_bad_ones_among_them(folder):
    expected = {text: (p.label, p.exit_layer) for text, p in zip(TEXTS, Classifier(folder)(TEXTS), strict=True)}

    def client(port: int, number: int) -> Counter:
        """Counts of statuses; a response that is wrong has a name of its own."""
        counts, rng = Counter(), random.Random(number)
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            for _ in range(REQUESTS // CLIENTS):
                kind = rng.random()
                if kind < 0.05:
                    connect(port, HALF).close()
                    counts["half"] += 1
                    continue
                texts = rng.choices(TEXTS, k=rng.randint(1, 8))
                body, status = rng.choice(BAD) if kind < 0.2 else (json.dumps({"texts": texts}).encode(), 200)
                connection.request("POST", "/predict", body)
                response = connection.getresponse()
                content = json.load(response)
                right = response.status == status
                if right and status == 200:
                    predictions = [(p["label"], p["exit_layer"]) for p in content["predictions"]]
                    right = predictions == [expected[text] for text in texts]
                counts[response.status if right else f"wrong: {response.status} {content}"] += 1
        return counts

    with server(folder) as (process, port), ThreadPoolExecutor(CLIENTS) as pool:
        sum(pool.map(client, [port] * 2, range(2)), Counter())  # warm
        before, start = resident_mb(process), time.perf_counter()
        counts = sum(pool.map(client, [port] * CLIENTS, range(CLIENTS)), Counter())
        seconds, memory = time.perf_counter() - start, resident_mb(process) - before
        print(f"{REQUESTS} requests in {seconds:.0f} s: {dict(counts)}; memory {memory:+.0f} MB")
        end(process)
    assert counts.keys() == {"half", 200, 400, 413, 422}
    assert memory < 30
