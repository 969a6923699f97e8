"""A running service for tests, and its clients."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

from support.helpers import ROOT


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


def end(process: subprocess.Popen) -> float:
    """The seconds from SIGTERM to the end, which has status 0 and no traceback."""
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 1  # a note that the model has no threshold
    return time.perf_counter() - start


def post(port: int, body: bytes | dict) -> tuple[int, dict]:
    """Status and content of the response to a request for predictions."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/predict", body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.load(response)


def health_seconds(port: int) -> float:
    """How long /health takes, on a new connection."""
    start = time.perf_counter()
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/health")
        assert json.load(connection.getresponse()) == {"status": "ok"}
    return time.perf_counter() - start


def connect(port: int, sent: bytes = b"") -> socket.socket:
    """A client of few buffers that has sent this."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(30)
    client.connect(("127.0.0.1", port))
    client.sendall(sent)
    return client


def resident_mb(process: subprocess.Popen) -> float:
    """The memory that a process has now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def cpu_seconds(process: subprocess.Popen) -> float:
    """The time of cores that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
