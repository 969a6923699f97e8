"""The benchmark: every system gives the same labels, and the table says what was measured."""

import csv
from functools import partial

import benchmark
import pytest
import static_models
import torch
from benchmarking import EARLY, Row, verdicts
from transformers import BertConfig, BertForSequenceClassification

from deebert.evaluation.plotting import labels
from deebert.modeling.checkpoints import load_config, max_tokens
from deebert.utils import cli
from deebert.utils.errors import InputError

FITTING = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "id2label")


@pytest.mark.slow
def test_all_systems_side_by_side(tmp_path, tiny_data, small_exports, monkeypatch, capsys):
    config, static = load_config(f"{small_exports}/model"), tmp_path / "one_layer"
    fitting = BertConfig(num_hidden_layers=1, **{name: getattr(config, name) for name in FITTING})
    static_models.MeanPooledForSequenceClassification(fitting).save_pretrained(static)
    argv = f"benchmark.py --output_dir {small_exports}/model --task_name SST-2 --data_dir {tiny_data}/SST-2 --no_cuda"
    argv += f" --samples 12 --benchmark_dir {tmp_path}/out --repeats 2 --batch_sizes 1 5 32 --exit_threshold 0.693"
    monkeypatch.setattr("sys.argv", [*argv.split(), "--static", str(static)])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its own takes a minute
    cli.run(benchmark.main)
    printed, notes = capsys.readouterr()
    assert "note: no batches of 32: there are 12 samples" in notes
    assert "12 samples" in printed
    assert (tmp_path / "out/benchmark.md").read_text().strip() in printed
    assert (tmp_path / "out/benchmark.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "out/benchmark.csv").open()))
    ways = ("PyTorch", "torch.compile")
    (name,) = labels([static])
    assert [(row["model"], row["runtime"]) for row in rows] == [
        *((model, way) for model in ("full", name) for way in ways),
        *((EARLY, "PyTorch") for _ in range(2)),
    ]
    for row in rows:
        assert float(row["p50"]) <= float(row["p99"])
        assert min(float(row[name]) for name in ("p50", "batch_1", "batch_5")) > 0
        assert float(row["agreement"]) == 1
        saves = row["model"] == name or row["threshold"] == "0.693"
        assert (float(row["cost"]) < 1) == saves


def test_a_static_model_has_to_fit(tmp_path, small_exports):
    config = load_config(f"{small_exports}/model")
    for changed, message in (
        ({"id2label": {0: "a", 1: "b"}}, "its labels differ"),
        ({"vocab_size": config.vocab_size + 1}, "its vocabulary differs"),
        ({"max_position_embeddings": 9}, "it takes 9 tokens; a text has 10"),
        ({}, None),
    ):
        fitting = {name: getattr(config, name) for name in FITTING} | changed
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **fitting))
        model.save_pretrained(tmp_path)
        if message is None:
            assert benchmark.load_static(str(tmp_path), config, max_tokens(config)).config.num_hidden_layers == 1
            continue
        with pytest.raises(InputError, match=f"--static {tmp_path}: {message}"):
            benchmark.load_static(str(tmp_path), config, 10)


def test_verdicts_compare_equal_scores():
    def row(model: str, threshold: float | None, score: float, ms: float, runtime: str = "PyTorch") -> Row:
        return Row(runtime, model, threshold, score, 1.0, ms, ms, per_sample={1: ms})

    rows = [
        *(row("full", None, 0.900, 10.0), row("small", None, 0.880, 4.0), row("middle", None, 0.895, 7.5)),
        *(row(EARLY, -1.0, 0.900, 10.1), row(EARLY, 0.2, 0.895, 5.0), row(EARLY, 0.4, 0.889, 3.0)),
    ]
    assert verdicts(rows) == (
        "- PyTorch, batch 1: early exit at 0.2 scores 89.5 %, 2.00 times as fast as the full model (90.0 %), "
        "1.50 times as fast as middle (89.5 %)"
    )
    rows[2].score = 0.85
    assert verdicts(rows).endswith("(90.0 %); no static model scores as much")
    assert verdicts([*rows, row(EARLY, 0.2, 0.9, 1.0, "CUDA graphs")]) == verdicts(rows)  # nothing to compare with
