"""Texts in, labels out: the same from any number of threads, with what was counted on the way."""

import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import ROOT
from support.saved import TEXTS, save_classifier
from support.tiny import BACKBONES, tiny_model, tiny_tokenizer

from deebert import Classifier
from deebert.commands import export
from deebert.data.encoding import TextEncoder
from deebert.modeling.checkpoints import (
    load_config,
    load_model,
    load_tokenizer,
    max_tokens,
    save_model,
    set_labels,
)
from deebert.runtime.classifier import Watch
from deebert.utils.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def classifier(folder) -> Classifier:
    return Classifier(folder, batch_size=4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tokens_are_those_of_transformers(backbone):
    tokenizer, rng = tiny_tokenizer(backbone), random.Random(0)
    texts = [" ".join(rng.choices(["good", "film", "xyz", "¿é", "."], k=rng.randint(0, 20))) for _ in range(40)]
    for length in (8, 9, 17):
        encoder = TextEncoder(tokenizer.backend_tokenizer, length, tokenizer.pad_token_id, backbone == "bert")
        for items in ([(text,) for text in texts], list(zip(texts, texts[::-1], strict=True))):
            columns = [list(column) for column in zip(*items, strict=True)]
            expected = tokenizer(
                *columns, truncation="longest_first", max_length=length, padding=True, return_tensors="np"
            )
            free = tokenizer(*columns)
            encoded = encoder(items)
            actual = encoded.padded(range(len(items)))
            assert actual.keys() == dict(expected).keys()
            for name, array in actual.items():
                np.testing.assert_array_equal(array, expected[name])
            assert encoded.truncated == [len(ids) > length for ids in free["input_ids"]]


def test_texts_are_cut_where_the_training_cut_them(folder, tmp_path):
    assert Classifier(folder).encode.max_tokens == 66  # the model's limit, below the default of 128
    config = json.loads(Path(folder, "config.json").read_text())
    shorter = shutil.copytree(folder, tmp_path / "shorter")
    (shorter / "config.json").write_text(json.dumps(config | {"max_seq_length": 9}))
    assert Classifier(str(shorter))(["good " * 20])[0].truncated
    assert not Classifier(str(shorter), max_seq_length=30)(["good " * 20])[0].truncated


def test_two_long_texts_are_cut_in_no_time():
    """Tokenizers keep every combination of what they cut from both texts of a pair: this took them a minute."""
    tokenizer = tiny_tokenizer("bert")
    encode = TextEncoder(tokenizer.backend_tokenizer, 64, tokenizer.pad_token_id, True)
    start = time.perf_counter()
    encoded = encode([("good " * 10_000, "bad " * 10_000)])
    assert time.perf_counter() - start < 10
    assert (len(encoded.ids[0]), encoded.truncated) == (64, [True])


def test_batches_pairs_and_nothing(classifier):
    alone = [classifier([text])[0] for text in TEXTS]
    for together in (classifier(TEXTS), classifier([(text,) for text in TEXTS])):
        assert [(p.label, p.exit_layer) for p in together] == [(p.label, p.exit_layer) for p in alone]
        assert [p.probability for p in together] == pytest.approx([p.probability for p in alone], abs=1e-5)
    assert len({p.exit_layer for p in alone}) > 1
    for p in alone:
        assert p.probabilities[p.label] == p.probability == max(p.probabilities.values())
        assert sum(p.probabilities.values()) == pytest.approx(1)
    assert len(classifier([("a film", "good"), ("a film", "bad")])) == 2
    assert classifier([]) == []


WRONG = ["a film", ["a", ("b", "c")], [("a", "b", "c")], [None], ["a", 3], [float("nan")], {"a": "b"}, ["\ud800"]]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_input_that_is_no_text_is_refused(classifier, wrong):
    with pytest.raises(ValueError):  # noqa: PT011  each has its own words, one of them the tokenizer's
        classifier(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size: give a whole number"),
        ({"batch_size": 2.5}, "batch_size: give a whole number"),
        ({"audit": 1.5}, "audit 1.5: "),
        ({"audit": math.nan}, "audit nan: "),
        ({"audit": "0.1"}, "audit 0.1: "),
        ({"max_seq_length": 3}, "max_seq_length 3"),
        ({"max_seq_length": "9"}, "max_seq_length: give a whole number"),
    ],
)
def test_a_value_out_of_range_gets_one_clear_line(folder, wrong, message):
    with pytest.raises(InputError, match=message):
        Classifier(folder, **wrong)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "2"])
def test_the_number_of_labels_is_above_0(classifier, top_k):
    with pytest.raises(ValueError, match="top_k: give a whole number above 0"):
        classifier(TEXTS, top_k=top_k)


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})  # as tokenizers raises it


@pytest.mark.parametrize("error", [Exception("Missing [UNK] token"), PanicException("index out of bounds")])
def test_texts_that_a_tokenizer_cannot_encode_get_one_line(classifier, monkeypatch, error):
    class Broken:
        def encode_batch_fast(self, *_, **__):
            raise error

    encode = TextEncoder(tiny_tokenizer("bert").backend_tokenizer, 64, 0, True)
    encode.tokenizer = Broken()
    monkeypatch.setattr(classifier, "encode", encode)
    with pytest.raises(InputError, match=f"the tokenizer cannot encode the texts: {re.escape(str(error))}"):
        classifier(TEXTS)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        classifier(TEXTS)


@pytest.mark.parametrize("texts", [["a", "b\ud83d"], [("a", "\udcff")]])
def test_half_of_a_surrogate_pair_gets_one_line(classifier, texts):
    with pytest.raises(InputError, match="a text is not valid Unicode"):
        classifier(texts)


def test_an_unknown_rule_gets_one_clear_line(folder):
    with pytest.raises(InputError, match="exit_rule is 'boredom'; choose one of"):
        Classifier(folder, 0.1, exit_rule="boredom")


def test_a_call_has_its_own_threshold_and_rule(classifier):
    assert {p.exit_layer for p in classifier(TEXTS, exit_threshold=-1)} == {4}
    assert {p.exit_layer for p in classifier(TEXTS, exit_threshold=1, exit_rule="patience")} == {1}
    for options in ({"exit_rule": "confidence"}, {"exit_threshold": math.nan}, {"exit_threshold": [1, 2]}):
        with pytest.raises(ValueError, match="exit_threshold"):
            classifier(TEXTS, **options)
    with pytest.raises(ValueError, match="exit_rule is 'learned'"):
        classifier(TEXTS, exit_threshold=0.5, exit_rule="learned")


@pytest.mark.parametrize("exported", [False, True])
def test_threads_do_not_disturb_one_another(folder, exports, exported, monkeypatch):
    """Each thread has its own thresholds and rules; PyTorch's number of threads stays as it is for all."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("changed for the process"))
    classify = Classifier(str(exports["roberta"] / "export") if exported else folder, batch_size=4)
    rules = (("entropy", 0.3), ("entropy", 0.6), ("confidence", 0.3), ("patience", 2), ("entropy", -1))
    options = [{"exit_threshold": threshold, "exit_rule": rule} for rule, threshold in rules]
    batches = [TEXTS[:1], TEXTS[1:4], TEXTS]

    def call(i: int):
        return classify(batches[i % 3], **options[i % 5])

    expected = [call(i) for i in range(15)]
    assert len({p.exit_layer for predictions in expected for p in predictions}) > 1
    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(call, range(90))):
            assert actual == expected[i % 15]


FORKED = """
import os, sys
from deebert import Classifier
classify = Classifier(sys.argv[1])
classify(["good film"] * 20)
if os.fork() == 0:
    classify(["good film"] * 20)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_a_classifier_that_was_used_works_in_a_forked_process(folder):
    """With one thread alone, as tests run, PyTorch has none that the forked process could miss."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, folder],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "7\n", done.stderr


def test_a_pickle_loads_the_folder_again(classifier, folder):
    other = pickle.loads(pickle.dumps(Classifier(folder, 0.2, exit_rule="confidence", batch_size=2)))
    assert (other.batch_size, other.config.exit_rule, other.config.exit_threshold) == (2, "confidence", 0.2)
    expected = classifier(TEXTS, exit_threshold=0.2, exit_rule="confidence")
    assert [(p.label, p.exit_layer) for p in other(TEXTS)] == [(p.label, p.exit_layer) for p in expected]


def test_several_labels_a_text(tmp_path):
    model = tiny_model("bert", num_labels=3)
    set_labels(model.config, ("joy", "anger", "fear"))
    model.config.problem_type = "multi_label_classification"
    save_model(model, tiny_tokenizer("bert"), tmp_path)
    for p in Classifier(str(tmp_path))(TEXTS):
        with torch.no_grad():
            logits = model(**tiny_tokenizer("bert")(TEXTS[:1], return_tensors="pt")).logits
        assert p.label == [name for name, value in p.probabilities.items() if value > 0.5]
        assert p.probability == [p.probabilities[name] for name in p.label]
    first = Classifier(str(tmp_path))(TEXTS[:1])[0]
    assert list(first.probabilities.values()) == pytest.approx(logits.sigmoid()[0].tolist(), abs=1e-5)


def test_what_is_counted(folder):
    classify = Classifier(folder, max_seq_length=8, audit=1.0)
    predictions = classify(TEXTS)
    full = classify(TEXTS, exit_threshold=-1)  # the audit of these is the same, as they have run through all layers
    stats = classify.stats()
    layers = [p.exit_layer for p in [*predictions, *full]]
    assert stats["exits"] == {layer: layers.count(layer) for layer in range(1, 5)}
    assert (stats["texts"], stats["audited"]) == (18, 18)
    assert stats["changed"] == sum(a.label != b.label for a, b in zip(predictions, full, strict=True))
    assert stats["truncated"] == sum(p.truncated for p in [*predictions, *full]) > 0
    assert 0 < stats["latency_ms"]["p50"] <= stats["latency_ms"]["p99"]
    labels = [p.label for p in [*predictions, *full]]
    assert stats["labels"] == {label: labels.count(label) for label in labels}
    assert Watch(3).stats()["latency_ms"] == {"p50": None, "p95": None, "p99": None}


@pytest.mark.parametrize("several", [False, True])
def test_texts_of_which_the_model_is_less_sure_are_handed_over(tmp_path, several):
    model = tiny_model("bert", problem_type="multi_label_classification" if several else None)
    save_model(model, tiny_tokenizer("bert"), tmp_path)
    known = Classifier(str(tmp_path))(TEXTS)
    values = [p.probabilities.values() for p in known]
    sure = [min(max(x, 1 - x) for x in each) if several else max(each) for each in values]
    limit = float(np.median(sure))
    assert min(sure) < limit < max(sure)
    model.config.min_confidence = limit
    save_model(model, tiny_tokenizer("bert"), tmp_path)
    classify = Classifier(str(tmp_path))
    for before, after, certainty in zip(known, classify(TEXTS), sure, strict=True):
        assert after.handed_over == (certainty < limit - 1e-9)
        assert after.label == (None if after.handed_over else before.label)
        assert after.probabilities == pytest.approx(before.probabilities)
    stats = classify.stats()
    assert stats["handed_over"] == sum(certainty < limit - 1e-9 for certainty in sure)
    assert None not in stats["labels"]


def test_the_most_probable_labels_come_first(folder):
    (full,), (top,) = Classifier(folder)(TEXTS[:1]), Classifier(folder)(TEXTS[:1], top_k=1)
    assert list(top.probabilities) == [full.label]
    assert top.probabilities[full.label] == full.probability == max(full.probabilities.values())


def test_too_few_tokens_are_refused(folder):
    with pytest.raises(InputError, match="max_seq_length 2: give at least 8"):
        Classifier(folder, max_seq_length=2)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer, size = load_tokenizer(folder), load_config(folder).vocab_size
    tokenizer.add_tokens([f"[TICKET {i}]" for i in range(size - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    Classifier(str(tmp_path))  # as many tokens as embeddings
    tokenizer.add_tokens(["[ONE MORE]"])
    tokenizer.save_pretrained(tmp_path)
    line = rf"the tokenizer gives '\[ONE MORE\]' the number {size}, but the model has embeddings for {size} tokens"
    with pytest.raises(InputError, match=line):
        Classifier(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["export", "--model", str(tmp_path), "--output", str(tmp_path / "onnx")])
    with pytest.raises(InputError, match=line):
        export.main()
    assert not (tmp_path / "onnx").exists()


def test_a_saved_tokenizer_knows_the_longest_text(folder, tmp_path):
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    tokenizer.model_max_length = int(1e30)  # what transformers makes of no value
    save_model(load_model(folder, config), tokenizer, tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).model_max_length == max_tokens(config)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("model", {"type": "WordPiece", "vocab": {"a": 0}}),
    ],
)
def test_a_damaged_tokenizer_that_makes_the_library_panic_gets_one_line(folder, exports, tmp_path, part, value):
    for name, source in (("model", folder), ("onnx", exports["bert"] / "export")):
        shutil.copytree(source, tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
        with pytest.raises(InputError, match=r"no tokenizer.* that can be read"):
            Classifier(str(tmp_path / name))
