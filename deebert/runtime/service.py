"""The HTTP service: POST /predict, GET /metrics and GET /health. No text is kept or logged."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import ClientDisconnect

from deebert.data.encoding import as_tuples
from deebert.modeling.config_checks import MOST_LAYERS, is_number
from deebert.runtime.batching_worker import BatchingWorker, QueueFullError
from deebert.runtime.classifier import Classifier, check_whole

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # the latency histogram's limits
BODIES = 32  # of the largest size, that may be in memory
COUNTS = {  # in `Classifier.stats`: the name in Prometheus, the text, and the label where there are several
    "exits": ("deebert_exits", "Texts by the layer after which they exited", "layer"),
    "labels": ("deebert_labels", "Texts by predicted label", "label"),
    "truncated": ("deebert_truncated_texts", "Texts that were cut", None),
    "handed_over": ("deebert_handed_over_texts", "Texts that got no label", None),
    "audited": ("deebert_audited_texts", "Texts that ran through all layers, too", None),
    "changed": ("deebert_changed_texts", "Audited texts whose label then changed", None),
}


@dataclass(frozen=True)
class Limits:
    """Of a request: the most texts, and bytes of its body. Of all requests that wait: the most texts."""

    max_texts: int = 256
    max_bytes: int = 1 << 20
    max_queue: int = 1024


class Metrics:
    """What GET /metrics returns to Prometheus: the classifier's counts, the queue, and requests by time and status."""

    def __init__(self, classifier: Classifier, worker: BatchingWorker):
        self.classifier, self.worker, self.registry = classifier, worker, CollectorRegistry()
        self.seconds = Histogram(
            "deebert_request_seconds", "From a request to its response", buckets=SECONDS, registry=self.registry
        )
        self.requests = Counter("deebert_requests", "Requests to /predict", ["status"], registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats = self.classifier.stats()
        for key, (name, text, label) in COUNTS.items():
            family = CounterMetricFamily(name, text, labels=[label] if label else [])
            for value, count in stats[key].items() if label else [(None, stats[key])]:
                family.add_metric([str(value)] if label else [], count)
            yield family
        yield GaugeMetricFamily("deebert_queue_texts", "Texts that wait or are active", value=self.worker.pending)


class Bodies:
    """Bounds the body of a request before it is parsed, and those of all requests that wait for their response."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.held = max_bytes, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which counts until the end of the context. Raises HTTPException."""
        body, declared = bytearray(), int(request.headers.get("content-length", 0))
        try:
            async for chunk in request.stream():
                body += chunk
                self.held += len(chunk)
                if max(declared, len(body)) > self.max_bytes:
                    raise HTTPException(413, f"more than {self.max_bytes} bytes")
                if self.held > BODIES * self.max_bytes:
                    raise HTTPException(503, "too many large requests at once; try again", {"Retry-After": "1"})
            yield bytes(body)
        except ClientDisconnect:
            raise HTTPException(400, "the client went away") from None
        finally:
            self.held -= len(body)


def parse(body: bytes, max_texts: int) -> tuple[list[tuple[str, ...]], object, int | None]:
    """Texts or pairs, the threshold and top_k of a request. Raises HTTPException, with a line that repeats no text.

    By hand: pydantic makes an error for each element, which took seconds and a gigabyte for half a million of them.
    """
    try:
        fields = json.loads(body.decode())
    except (ValueError, RecursionError):  # also what is no UTF-8
        raise HTTPException(400, "body: not JSON in UTF-8, or nested too deeply") from None
    if not isinstance(fields, dict):
        raise HTTPException(422, 'body: give an object, such as {"texts": ["a text"]}')
    if unknown := fields.keys() - {"texts", "exit_threshold", "top_k"}:
        raise HTTPException(422, f"body: unknown field {min(unknown)[:50]!r}")
    texts, threshold, top_k = fields.get("texts"), fields.get("exit_threshold"), fields.get("top_k")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list):
        raise HTTPException(422, "texts: give a text, a list of texts, or a list of pairs [text, text]")
    if len(texts) > max_texts:
        raise HTTPException(413, f"texts: {len(texts)}; at most {max_texts} in a request")
    thresholds = threshold if isinstance(threshold, list) else [threshold]
    if threshold is not None and not (len(thresholds) <= MOST_LAYERS and all(map(is_number, thresholds))):
        raise HTTPException(422, "exit_threshold: give a number, or one for each off-ramp")
    try:
        check_whole(top_k=top_k)
        return as_tuples(texts), threshold, top_k
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def create_app(classifier: Classifier, limits: Limits) -> FastAPI:
    """The service as an ASGI application. When it ends, all requests that have arrived are finished first."""
    worker, bodies = BatchingWorker(classifier, limits.max_queue), Bodies(limits.max_bytes)
    metrics = Metrics(classifier, worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with worker:
            yield
            await asyncio.to_thread(worker.close)

    app = FastAPI(title="DeeBERT", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages load foreign scripts

    async def classify(request: Request) -> Response:
        async with bodies.read(request) as body:
            texts, threshold, top_k = parse(body, limits.max_texts)
            try:
                future = worker.submit(texts, threshold)
            except QueueFullError as error:
                raise HTTPException(429, f"{error}; try again", {"Retry-After": "1"}) from None
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            predictions = await asyncio.wrap_future(future)
        return JSONResponse({"predictions": [vars(prediction.top(top_k)) for prediction in predictions]})

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        start, status = perf_counter(), 500
        try:
            response = await classify(request)
            status = response.status_code
            metrics.seconds.observe(perf_counter() - start)
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.requests.labels(str(status)).inc()

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "stopped"}, 200 if worker.alive else 503)

    return app
