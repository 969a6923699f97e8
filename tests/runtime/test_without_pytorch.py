"""What an exported model needs: numpy, tokenizers and ONNX Runtime. It gives the same predicted without PyTorch."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support.helpers import ROOT
from support.saved import TEXTS
from support.tiny import BACKBONES, tiny_config, tiny_tokenizer
from transformers import AutoTokenizer

from deebert import Classifier
from deebert.data.encoding import TextEncoder
from deebert.modeling.checkpoints import encoding_facts
from deebert.runtime.exported import read_tokenizer

CALLS = [{}, {"exit_threshold": 0.5}, {"exit_threshold": 0.5, "exit_rule": "confidence"}]
CALLS += [{"exit_threshold": 2, "exit_rule": "patience"}]

BLOCK = """
import json, sys

MISSING = "torch transformers accelerate safetensors huggingface_hub scipy sklearn tqdm pandas pyarrow"

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""

PROGRAM = (
    BLOCK
    + """
import deebert
from deebert.commands import predict, serve
from deebert.runtime.batching_worker import BatchingWorker
folder, texts, calls = json.loads(sys.argv[1])
classify = deebert.Classifier(folder, batch_size=4)
predicted = []
for options in calls:
    predicted.append([(p.label, p.exit_layer, p.probability) for p in classify(texts, **options)])
with BatchingWorker(classify) as worker:
    ours = worker.submit([(text,) for text in texts]).result()
    predicted.append([(p.label, p.exit_layer, p.probability) for p in ours])
lines = []
for wrong in (lambda: deebert.DeeBertForSequenceClassification, lambda: deebert.Classifier("nowhere")):
    try:
        wrong()
    except (ImportError, ValueError) as error:
        lines.append(str(error))
print(json.dumps([predicted, lines]))
"""
)


def test_an_export_needs_no_pytorch(exports, tmp_path):
    folder = str(exports["roberta"] / "export")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([folder, TEXTS, CALLS])],
        env=os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*"))  # where ONNX Runtime keeps what it would report
    predicted, lines = json.loads(done.stdout)
    classify = Classifier(folder, batch_size=4)
    expected = [classify(TEXTS, **options) for options in CALLS]
    for ours, predictions in zip(predicted, [*expected, expected[0]], strict=True):
        assert [(label, layer) for label, layer, _ in ours] == [(p.label, p.exit_layer) for p in predictions]
        assert [p for *_, p in ours] == pytest.approx([p.probability for p in predictions], abs=1e-5)
    assert len({layer for rows in predicted for _, layer, _ in rows}) > 1
    for line in lines:
        assert re.search("(torch|transformers) is missing", line)
        assert "pip install -r requirements.txt" in line
        assert "\n" not in line


def test_predict_reads_tables_with_an_export_alone(exports):
    folder = str(exports["roberta"] / "export")
    program = f"{BLOCK}sys.argv = ['predict', '--model', {folder!r}, '--text_column', 'text']\n"
    program += "from deebert.commands import predict\npredict.main()"
    table = f'id,text\n7,"{TEXTS[0]}"\n'
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input=table, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, line = done.stdout.splitlines()
    assert header == "id,text,prediction,probability,exit_layer"
    assert line.split(",")[-3] == Classifier(folder)([TEXTS[0]])[0].label


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_tokenizer_is_read_as_transformers_does(tmp_path, backbone, side):
    tokenizer, rng = tiny_tokenizer(backbone), np.random.default_rng(0)
    tokenizer.truncation_side = side
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    facts = encoding_facts(tiny_config(backbone), theirs)
    assert facts["max_tokens"] == 66 - (2 if backbone == "roberta" else 0)
    encode = TextEncoder(read_tokenizer(tmp_path), **facts | {"max_tokens": 12})
    texts = [" ".join(rng.choice(["Good", "film", "xyz", "¿é", "."], rng.integers(0, 20))) for _ in range(30)]
    for items in ([(text,) for text in texts], list(zip(texts, texts[::-1], strict=True))):
        columns = [list(column) for column in zip(*items, strict=True)]
        expected = theirs(*columns, truncation="longest_first", max_length=12, padding=True, return_tensors="np")
        ours = encode(items).padded(range(len(items)))
        for name, array in ours.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert ours.keys() == dict(expected).keys()
