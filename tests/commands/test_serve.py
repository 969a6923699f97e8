"""The command that serves: what it refuses, and how it ends."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
from support.saved import TEXTS, save_classifier
from support.serving import end, post, server

from deebert.commands import serve
from deebert.utils.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("served"))


def test_sigterm_finishes_what_has_arrived(folder):
    with server(folder) as (process, port), ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(post, port, {"texts": TEXTS * 28}) for _ in range(4)]
        while "deebert_queue_texts 0.0" in urlopen(f"http://127.0.0.1:{port}/metrics").read().decode():
            pass
        end(process)
    responses = [client.result() for client in clients if not isinstance(client.exception(), OSError)]
    assert responses  # a client that was later than the signal got none
    assert {(status, len(content["predictions"])) for status, content in responses} == {(200, 252)}


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
