"""The HTTP service: POST /predict, GET /metrics and GET /health. No text is kept or logged."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, ConfigDict, Field

from deebert.runtime.batching_worker import BatchingWorker, QueueFullError
from deebert.runtime.classifier import Classifier, as_tuples

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # the latency histogram's limits


@dataclass(frozen=True)
class Limits:
    """Of a request: the most texts, and bytes of its body. Of all requests that wait: the most texts."""

    max_texts: int = 256
    max_bytes: int = 1 << 20
    max_queue: int = 1024


class PredictRequest(BaseModel):
    """texts: a text, a list of texts, or a list of pairs. exit_threshold: in place of the model's own."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: str | list[str] | list[Pair]
    exit_threshold: float | list[float] | None = None


class Metrics:
    """What GET /metrics returns to Prometheus: the watch's counts, the queue, and requests by time and status."""

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
        exits = CounterMetricFamily("deebert_exits", "Texts by the layer at which they exited", labels=["layer"])
        for layer, count in stats["exits"].items():
            exits.add_metric([str(layer)], count)
        yield exits
        yield CounterMetricFamily("deebert_truncated_texts", "Texts that were cut", value=stats["truncated"])
        yield CounterMetricFamily("deebert_audited_texts", "Texts that ran through all layers", value=stats["audited"])
        yield CounterMetricFamily(
            "deebert_changed_texts", "Audited texts whose label then changed", value=stats["changed"]
        )
        yield GaugeMetricFamily("deebert_queue_texts", "Texts that wait or are active", value=self.worker.pending)
        if stats["population_stability_index"] is not None:
            yield GaugeMetricFamily(
                "deebert_population_stability_index",
                "Exit layers of the last 10,000 texts against the dev set's; above 0.25 they have changed much",
                value=stats["population_stability_index"],
            )


class BodyLimit:
    """ASGI middleware: a body of more bytes gets status 413, before anything parses it."""

    def __init__(self, app, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                await JSONResponse({"detail": f"more than {self.max_bytes} bytes"}, 413)(scope, receive, send)
                return
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


class RequestCounter:
    """ASGI middleware around all others: counts the requests to /predict by the status of their responses."""

    def __init__(self, app, requests: Counter):
        self.app, self.requests = app, requests

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return

        async def counted(message):
            if message["type"] == "http.response.start":
                self.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            self.requests.labels("500").inc()  # Starlette makes this response outside of all middleware
            raise


def create_app(classifier: Classifier, limits: Limits) -> FastAPI:
    """The service as an ASGI application. When it ends, all requests that have arrived are finished first."""
    worker = BatchingWorker(classifier, limits.max_queue)
    metrics = Metrics(classifier, worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with worker:
            yield

    app = FastAPI(title="DeeBERT", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages load foreign scripts
    app.add_middleware(BodyLimit, max_bytes=limits.max_bytes)
    app.add_middleware(RequestCounter, requests=metrics.requests)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": one_line(error)}, 422)  # FastAPI's own repeats the texts

    @app.post("/predict")
    async def predict(request: PredictRequest) -> Response:
        start = perf_counter()
        texts = [request.texts] if isinstance(request.texts, str) else request.texts
        if not texts:
            raise HTTPException(422, "texts: give at least one")
        if len(texts) > limits.max_texts:
            raise HTTPException(413, f"texts: {len(texts)}; at most {limits.max_texts} in a request")
        try:
            encoded = await run_in_threadpool(classifier.encode, as_tuples(texts))
            future = worker.submit(encoded, request.exit_threshold)
        except QueueFullError as error:
            raise HTTPException(429, f"{error}; try again", {"Retry-After": "1"}) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        predictions = await asyncio.wrap_future(future)
        response = JSONResponse({"predictions": [vars(prediction) for prediction in predictions]})
        metrics.seconds.observe(perf_counter() - start)
        return response

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "stopped"}, 200 if worker.alive else 503)

    return app


def one_line(error: RequestValidationError) -> str:
    """What is wrong with a request, without its texts."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if isinstance(part, str)]  # the body, then a field of it
    if place[1:2] == ["texts"]:
        return "texts: give a text, a list of texts, or a list of pairs [text, text]"
    return f"{'.'.join(place[1:2]) or 'body'}: {first['msg']}"
