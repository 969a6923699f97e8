"""`deebert serve --model DIR`: classifies texts over HTTP.

POST /predict with {"texts": [...]}; GET /metrics for Prometheus; GET /health. Texts that arrive together go through the
model together. After SIGTERM it finishes the requests that have arrived, then ends.
"""

import argparse
import gc
import signal
import socket
import sys

from deebert.modeling.exit_rules import EXIT_RULES
from deebert.runtime.classifier import Classifier
from deebert.utils.cli import ArgumentParser, fraction, non_negative, positive
from deebert.utils.errors import InputError

SECONDS_TO_FINISH = 10  # that a shutdown waits for predictions, and for clients that are slow to receive them


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", required=True, help="folder of a trained or an exported model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's")
    parser.add_argument("--port", type=non_negative, default=8000, help="0: a free one")
    parser.add_argument("--exit_threshold", type=float, help="in place of the model's own")
    parser.add_argument("--exit_rule", choices=EXIT_RULES, help="in place of the model's own")
    parser.add_argument("--batch_size", type=positive, default=32, help="texts that enter the model at once")
    parser.add_argument("--max_seq_length", type=positive, help="longer texts are cut (default: as in the training)")
    parser.add_argument("--max_texts", type=positive, default=256, help="of one request; more: status 413")
    parser.add_argument("--max_body_kb", type=positive, default=1024, help="of one request; more: status 413")
    parser.add_argument("--max_queue", type=positive, default=1024, help="texts that may wait; more: status 429")
    parser.add_argument("--max_connections", type=positive, default=512, help="at once; silent ones make room")
    parser.add_argument("--max_seconds", type=positive, default=10, help="in which a request has to arrive")
    parser.add_argument(
        "--audit", type=fraction, default=0.0, help="share of texts that also run through all layers, to compare"
    )
    args = parser.parse_args()
    if args.max_texts > args.max_queue:
        raise InputError(f"--max_texts {args.max_texts}: more than --max_queue {args.max_queue}; give fewer")
    return args


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Connections inherit it. Without it a response's body waits 40 ms for the client to acknowledge the header:
        # asyncio sets it only where a socket names its protocol, and create_server's does not.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error}); give another") from None


def main() -> None:
    args = parse_args()
    try:
        import uvicorn

        from deebert.runtime.connections import BACKLOG, BoundedConnection, Server
        from deebert.runtime.service import Limits, create_app
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install fastapi uvicorn prometheus-client") from None
    classifier = Classifier(
        args.model, args.exit_threshold, args.max_seq_length, args.exit_rule, args.batch_size, args.audit
    )
    if note := classifier.threshold_note(args.exit_threshold):
        print(f"note: {note}", file=sys.stderr)
    gc.freeze()  # what is loaded stays: to look at it in each full collection holds requests up for 0.2 s
    app = create_app(classifier, Limits(args.max_texts, 1024 * args.max_body_kb, args.max_queue))
    with listening_socket(args.host, args.port) as listening:
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving {args.model} at http://{host}:{port}/predict", flush=True)
        config = uvicorn.Config(
            app,
            http=BoundedConnection.with_limits(args.max_connections, args.max_seconds),
            ws="none",
            backlog=BACKLOG,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends, then raises the signal once more
        Server(config).run(sockets=[listening])
