"""The command that serves: what it refuses, and how it ends."""

import json
import re
import socket
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.request import Request, urlopen

import load_test
import pytest
from saved import TEXTS, save_classifier

from deebert.commands import serve
from deebert.utils.errors import InputError


def test_sigterm_answers_what_has_arrived(tmp_path):
    answers = []

    def post(address: str) -> None:
        body = json.dumps({"texts": TEXTS * 28}).encode()
        with urlopen(Request(f"http://{address}/predict", body, {"Content-Type": "application/json"})) as answer:
            answers.append(len(json.load(answer)["predictions"]))

    with load_test.server(save_classifier(tmp_path), []) as address:  # its end is SIGTERM, and status 0
        clients = [Thread(target=post, args=(address,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        while "deebert_queue_texts 0.0" in urlopen(f"http://{address}/metrics").read().decode():
            pass
    for thread in clients:
        thread.join()
    assert len(answers) > 0  # a client that was later than the signal got none
    assert set(answers) == {252}


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


def test_an_answer_does_not_wait_for_an_acknowledgement():
    with (
        serve.listening_socket("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("status", [200, 429])
def test_the_load_test_compares_both(tmp_path, monkeypatch, capsys, status):
    bodies = []

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    flags = []

    @contextmanager
    def server(model: str, given: list[str]):
        flags.append(given)
        with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
            Thread(target=http.serve_forever, daemon=True).start()
            try:
                yield f"127.0.0.1:{http.server_port}"
            finally:
                http.shutdown()  # without it the thread spins for ever on the closed socket

    (tmp_path / "texts").write_text("\n".join(TEXTS))
    monkeypatch.setattr(load_test, "server", server)
    arguments = ["--model", "m", "--file", str(tmp_path / "texts"), "--exit_threshold", "9", "--clients", "2"]
    monkeypatch.setattr("sys.argv", ["load_test", *arguments, "--seconds", "0.2", "--repeats", "1"])
    if status != 200:
        with pytest.raises(InputError, match="status 429"):
            load_test.main()
        return
    load_test.main()
    assert flags == [["--exit_threshold=-1"], ["--exit_threshold=9.0"]]
    assert {body["texts"] for body in bodies} == set(TEXTS)
    _, _, full, early = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| 2 \| full model \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", full)
    assert re.fullmatch(r"\| 2 \| early exit at 9 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", early)
