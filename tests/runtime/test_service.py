"""The service predicts what the classifier predicts, with any number of clients, and outlives bad requests."""

import asyncio
import gzip
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from time import process_time

import httpx
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from support.saved import TEXTS, save_classifier

from deebert import Classifier
from deebert.runtime.batching_worker import BatchingWorker, QueueFullError
from deebert.runtime.service import Limits, create_app, parse

LIMITS = Limits(max_texts=9, max_bytes=4000, max_queue=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("service"))


@pytest.fixture
def classifier(folder) -> Classifier:
    return Classifier(folder, batch_size=4)


@pytest.fixture
def client(classifier):
    with TestClient(create_app(classifier, LIMITS), raise_server_exceptions=False) as client:
        yield client


def alike(actual: list[dict], expected: list) -> bool:
    return [(p["label"], p["exit_layer"]) for p in actual] == [(p.label, p.exit_layer) for p in expected]


def test_one_text_many_texts_and_pairs(client, classifier):
    expected = classifier(TEXTS)
    for texts, predictions in ((TEXTS[0], expected[:1]), (TEXTS, expected)):
        actual = client.post("/predict", json={"texts": texts}).json()["predictions"]
        assert alike(actual, predictions)
        assert actual[0]["probabilities"] == pytest.approx(predictions[0].probabilities, abs=1e-5)
        assert actual[0].keys() == vars(predictions[0]).keys()
    pairs = [(text, "good") for text in TEXTS]
    assert alike(client.post("/predict", json={"texts": pairs}).json()["predictions"], classifier(pairs))


@pytest.mark.parametrize(("rule", "exported"), [("entropy", False), ("patience", False), ("entropy", True)])
def test_requests_with_different_thresholds_share_batches(folder, exports, rule, exported):
    thresholds = [2, -1, 1, 3, None] if rule == "patience" else [0.5, -1, 0.3, 9, None]
    own = {"exit_threshold": 2, "exit_rule": rule} if rule == "patience" else {}
    classify = Classifier(str(exports["roberta"] / "export") if exported else folder, batch_size=8, **own)
    expected = [classify(TEXTS, exit_threshold=threshold) for threshold in thresholds]
    with BatchingWorker(classify) as worker:
        futures = [worker.submit([(text,) for text in TEXTS], thresholds[i % 5]) for i in range(20)]
        for i, future in enumerate(futures):
            actual = future.result(60)
            assert [(p.label, p.exit_layer) for p in actual] == [(p.label, p.exit_layer) for p in expected[i % 5]]
    assert worker.pending == 0
    assert len({p.exit_layer for actual in expected for p in actual}) > 1


def test_at_the_same_time(classifier):
    """Forty requests in one event loop, each with its own texts; then the counts are those of all of them."""
    expected = {text: classifier([text])[0] for text in TEXTS}
    before = classifier.stats()["texts"]
    app = create_app(classifier, Limits())

    async def all_at_once():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            return await asyncio.gather(*(http.post("/predict", json={"texts": TEXTS[i % 9]}) for i in range(40)))

    for i, response in enumerate(asyncio.run(all_at_once())):
        assert alike(response.json()["predictions"], [expected[TEXTS[i % 9]]])
    assert classifier.stats()["texts"] == before + 40


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"json": {}}, 422, "texts: give a text"),
        ({"json": {"texts": []}}, 422, "give at least one text"),
        ({"json": {"texts": [3]}}, 422, "texts have to be strings"),
        ({"json": {"texts": ["a", ["b", "c"]]}}, 422, "all of them pairs"),
        ({"json": {"texts": [["a", "b", "c"]]}}, 422, "all of them pairs"),
        ({"json": {"text": "a"}}, 422, "text"),
        ({"json": {"texts": "a", "exit_threshold": "0.3"}}, 422, "exit_threshold: "),
        ({"json": {"texts": "a", "exit_threshold": [0.3]}}, 422, "exit_threshold has 1 values"),
        ({"content": '{"texts": "a", "exit_threshold": NaN}'}, 422, "exit_threshold is NaN"),
        ({"content": '{"texts": "\\ud800"}'}, 422, "not valid Unicode"),
        ({"json": {"texts": "a", "exit_threshold": True}}, 422, "exit_threshold: "),
        ({"json": {"texts": "a", "exit_threshold": 10**400}}, 422, "exit_threshold: "),
        ({"json": {"texts": "a", "exit_threshold": [0.3, None, 0.3]}}, 422, "exit_threshold: "),
        ({"json": {"texts": "a", "top_k": 0}}, 422, "top_k: "),
        ({"json": ["a"]}, 422, "body: give an object"),
        ({"content": "{"}, 400, "body: not JSON"),
        ({"content": ""}, 400, "body: not JSON"),
        ({"content": "[" * 3000}, 400, "body: not JSON"),
        ({"content": b"\xff"}, 400, "body: not JSON"),
        ({"content": gzip.compress(b'{"texts": "a"}')}, 400, "body: not JSON"),
        ({"json": {"texts": ["a"] * 10}}, 413, "texts: 10; at most 9"),
        ({"json": {"texts": "a" * 4000}}, 413, "more than 4000 bytes"),
    ],
)
def test_bad_requests_get_a_status_and_a_line_and_the_service_goes_on(client, request_, status, message):
    headers = {"Content-Type": "application/json"}
    response = client.post("/predict", headers=headers, **request_)
    assert response.status_code == status
    assert message in response.json()["detail"]
    assert client.post("/predict", json={"texts": TEXTS}).status_code == 200


def test_a_full_queue_is_status_429(classifier, client, monkeypatch):
    gate, classify = threading.Event(), classifier.classify
    monkeypatch.setattr(classifier, "classify", lambda *a: gate.wait(60) and classify(*a))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/predict", json={"texts": TEXTS}) for _ in range(2)]
        while client.get("/metrics").text.find("deebert_queue_texts 18.0") < 0:
            pass
        refused = client.post("/predict", json={"texts": TEXTS})
        gate.set()
        assert [w.result().status_code for w in waiting] == [200, 200]
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert client.post("/predict", json={"texts": TEXTS}).status_code == 200


def test_an_error_of_one_text_ends_its_request_only(classifier, client, monkeypatch):
    """The three requests are one batch: it waits until all have arrived, then fails, and runs again text by text."""
    gate, classify = threading.Event(), classifier.classify
    bad = classifier.encode([("so so",)]).ids[0]

    def fail(encoded, options):
        gate.wait(60)
        if bad in encoded.ids:
            raise ArithmeticError("a text that breaks the model")
        return classify(encoded, options)

    monkeypatch.setattr(classifier, "classify", fail)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, "/predict", json={"texts": [text]}) for text in ("good", "so so", "bad")]
        while "deebert_queue_texts 3.0" not in client.get("/metrics").text:
            pass
        gate.set()
        statuses = [response.result().status_code for response in waiting]
    assert statuses == [200, 500, 200]
    assert client.post("/predict", json={"texts": ["good", "so so"]}).status_code == 500
    assert client.get("/health").json() == {"status": "ok"}
    metrics = client.get("/metrics").text
    assert "deebert_queue_texts 0.0" in metrics
    assert 'deebert_requests_total{status="500"} 2.0' in metrics


def test_the_most_probable_labels(client, classifier):
    (expected,) = classifier([TEXTS[0]])
    for k in (1, 2, 99):
        (actual,) = client.post("/predict", json={"texts": TEXTS[0], "top_k": k}).json()["predictions"]
        assert actual["label"] == expected.label
        assert next(iter(actual["probabilities"])) == expected.label
        assert len(actual["probabilities"]) == min(k, len(expected.probabilities))
        values = list(actual["probabilities"].values())
        assert values == sorted(values, reverse=True)


def test_health_by_head(client):
    assert client.head("/health").status_code == 200


def test_half_a_million_wrong_elements_are_refused_in_a_moment():
    body = json.dumps({"texts": [7] * 500_000}).encode()
    tracemalloc.start()
    with pytest.raises(HTTPException) as refused:
        parse(body, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    start = process_time()
    with pytest.raises(HTTPException):
        parse(body, 256)
    assert refused.value.status_code == 413
    assert peak < 100e6
    assert process_time() - start < 0.3  # 6 with pydantic


def test_metrics(folder):
    classify = Classifier(folder, audit=1.0)
    expected = classify(TEXTS)
    full = classify(TEXTS, exit_threshold=-1)
    classify = Classifier(folder, audit=1.0)
    with TestClient(create_app(classify, Limits())) as client:
        for _ in range(12):
            client.post("/predict", json={"texts": TEXTS})
        client.post("/predict", json={})
        client.post("/predict", content=bytes(Limits().max_bytes + 1))
        while "deebert_audited_texts_total 108.0" not in (text := client.get("/metrics").text):
            pass
    for layer in range(1, 5):
        count = 12 * sum(p.exit_layer == layer for p in expected)
        assert f'deebert_exits_total{{layer="{layer}"}} {count}.0' in text
    changed = 12 * sum(a.label != b.label for a, b in zip(expected, full, strict=True))
    assert f"deebert_changed_texts_total {changed}.0" in text
    assert 'deebert_requests_total{status="200"} 12.0' in text
    assert 'deebert_requests_total{status="422"} 1.0' in text
    assert 'deebert_requests_total{status="413"} 1.0' in text
    assert "deebert_request_seconds_count 12.0" in text
    for label in {p.label for p in expected}:
        assert f'deebert_labels_total{{label="{label}"}} {12 * sum(p.label == label for p in expected)}.0' in text


def test_what_was_cancelled_is_dropped(classifier, monkeypatch):
    """A shutdown whose time is up cancels requests: it then waits for the batch in the model alone."""
    began, gate, classify, sizes = threading.Event(), threading.Event(), classifier.classify, []

    def wait(encoded, options):
        began.set()
        gate.wait(60)
        sizes.append(len(encoded))
        return classify(encoded, options)

    monkeypatch.setattr(classifier, "classify", wait)
    with BatchingWorker(classifier) as worker:
        first = worker.submit([(TEXTS[0],)])
        began.wait(60)
        futures = [worker.submit([(text,) for text in TEXTS]) for _ in range(30)]
        assert all(future.cancel() for future in futures)
        assert worker.pending == 1
        gate.set()
    assert len(first.result(0)) == 1
    assert sizes == [1]


def test_the_event_loop_goes_on_while_the_service_ends(classifier, monkeypatch):
    gate, classify = threading.Event(), classifier.classify
    monkeypatch.setattr(classifier, "classify", lambda *a: gate.wait(60) and classify(*a))
    app = create_app(classifier, LIMITS)

    async def end_while_a_text_is_in_the_model() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as http:
            async with app.router.lifespan_context(app):
                request = asyncio.create_task(http.post("/predict", json={"texts": TEXTS[0]}))
                while "deebert_queue_texts 1.0" not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                asyncio.get_running_loop().call_later(0.05, gate.set)  # never called if the loop waits for the model
            return await request

    assert asyncio.run(end_while_a_text_is_in_the_model()).status_code == 200


def test_what_has_arrived_is_finished_at_the_end(classifier):
    with BatchingWorker(classifier) as worker:
        futures = [worker.submit([(text,) for text in TEXTS]) for _ in range(30)]
    assert all(len(future.result(0)) == 9 for future in futures)
    with pytest.raises(QueueFullError):
        worker.submit([("a",)])
    assert not worker.alive
