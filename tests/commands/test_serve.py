"""The command that serves: what it refuses, how it ends, and what hostile clients do to it."""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread
from urllib.request import Request, urlopen

import pytest
from helpers import ROOT
from saved import TEXTS, save_classifier

from deebert.commands import serve
from deebert.utils.errors import InputError

HALF = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"  # a body that never ends


@contextmanager
def server(folder: str, *flags: str, files: int | None = None) -> Iterator[tuple[subprocess.Popen, int]]:
    """A running service and its port. files: the most open files of its process."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-m", "deebert", "serve", "--model", folder, "--port", "0", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=files and limit
    )
    try:
        line = process.stdout.readline()
        yield process, int(re.search(r":(\d+)/predict", line)[1])
    finally:
        process.kill()
        process.wait()


def end(process: subprocess.Popen) -> tuple[float, str]:
    """The seconds from SIGTERM to the end, which has status 0, and what the service printed as errors."""
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    return time.perf_counter() - start, errors


def health(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as response:
        return json.load(response)["status"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("served"))


def test_sigterm_finishes_what_has_arrived(folder):
    sizes = []

    def post(port: int) -> None:
        body = json.dumps({"texts": TEXTS * 28}).encode()
        with urlopen(Request(f"http://127.0.0.1:{port}/predict", body)) as response:
            sizes.append(len(json.load(response)["predictions"]))

    with server(folder) as (process, port):
        clients = [Thread(target=post, args=(port,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        while "deebert_queue_texts 0.0" in urlopen(f"http://127.0.0.1:{port}/metrics").read().decode():
            pass
        end(process)
    for thread in clients:
        thread.join()
    assert len(sizes) > 0  # a client that was later than the signal got nothing
    assert set(sizes) == {252}


@pytest.mark.slow
def test_half_a_request_delays_no_end(folder):
    with server(folder) as (process, port), socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HALF)
        assert health(port) == "ok"
        seconds, errors = end(process)
    assert seconds < serve.SECONDS_TO_FINISH
    assert errors.replace("note: ", "").count("\n") <= 1  # that the model has no threshold


@pytest.mark.slow
def test_a_request_that_does_not_arrive_is_given_up(folder):
    with server(folder, "--max_seconds", "1") as (_, port):
        for sent in (b"", b"POST /pre", HALF):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(sent)
                with suppress(ConnectionResetError):
                    assert client.recv(100) == b""
        assert health(port) == "ok"


@pytest.mark.slow
def test_more_silent_connections_than_files(folder):
    with server(folder, files=300) as (process, port), ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        assert health(port) == "ok"
        _, errors = end(process)
    assert "Traceback" not in errors


def test_what_cannot_be_served_gets_one_clear_line(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            serve.listening_socket("127.0.0.1", port)
    with pytest.raises(InputError, match="cannot listen"):
        serve.listening_socket("127.0.0.1", 99999)
    monkeypatch.setattr("sys.argv", ["serve", "--model", "x", "--max_texts", "9", "--max_queue", "8"])
    with pytest.raises(InputError, match="--max_texts 9: more than --max_queue 8"):
        serve.main()
    monkeypatch.setattr("sys.argv", ["serve", "--model", "x"])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match="uvicorn is missing: pip install fastapi uvicorn"):
        serve.main()


def test_a_response_does_not_wait_for_an_acknowledgement():
    with (
        serve.listening_socket("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
