"""The benchmark: every system answers alike, and the table says what was measured."""

import csv
from functools import partial

import benchmark
import pytest
import torch
from support.exported import parts_kept_in
from transformers import BertConfig, BertForSequenceClassification

from deebert.evaluation.series import labels
from deebert.modeling.checkpoints import load_config, load_model, max_tokens
from deebert.utils import cli
from deebert.utils.errors import InputError


@pytest.mark.slow
def test_all_systems_side_by_side(tmp_path, tiny_data, small_exports, monkeypatch, capsys):
    argv = f"benchmark --model {small_exports}/model --task_name SST-2 --data_dir {tiny_data}/SST-2"
    argv += f" --samples 12 --output_dir {tmp_path}/out --repeats 2 --batch_sizes 1 5 32 --exit_threshold 0.693"
    argv += f" --smaller {tmp_path}/one_layer"
    config = load_config(f"{small_exports}/model")
    taken = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "id2label")
    smaller = BertConfig(num_hidden_layers=1, **{name: getattr(config, name) for name in taken})
    BertForSequenceClassification(smaller).save_pretrained(tmp_path / "one_layer")
    layers = config.num_hidden_layers
    monkeypatch.setattr("sys.argv", argv.split())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its own takes a minute
    with parts_kept_in(small_exports / "parts"):
        cli.run(benchmark.main)
    printed, notes = capsys.readouterr()
    assert "note: no batches of 32: there are 12 samples" in notes
    assert "12 samples" in printed
    assert "full model, ONNX Runtime int8, ms a text: torch.export" in printed
    assert (tmp_path / "out/benchmark.md").read_text().strip() in printed
    assert (tmp_path / "out/benchmark.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "out/benchmark.csv").open()))
    early = [f"DeeBERT, {runtime}" for runtime in ("PyTorch", "ONNX Runtime fp32", "ONNX Runtime int8")]
    ways = ("PyTorch", "torch.compile", "ONNX Runtime fp32", "ONNX Runtime int8")
    full, smaller = ([f"{way}, {name}" for way in ways] for name in ("full", "one_layer"))
    assert [row["system"] for row in rows] == [*full, *smaller, *(name for name in early for _ in range(2))]
    for large, small in zip(rows[:4], rows[4:8], strict=True):
        assert float(small["layers_run"]) == 1 / layers
        assert float(small["floor"]) < float(large["floor"])
    rows[4:8] = []
    for row in rows:
        assert float(row["p50"]) <= float(row["p90"]) <= float(row["p99"])
        assert min(float(row[name]) for name in ("p50", "floor", "batch_1", "batch_5")) > 0
        if "int8" not in row["system"]:
            assert float(row["agreement"]) == 1
        assert float(row["layers_run"]) == 1 or row["threshold"] == "0.693"
    assert float(rows[5]["layers_run"]) == float(rows[7]["layers_run"]) < 1
    assert float(rows[5]["floor"]) < float(rows[4]["floor"])


def test_a_smaller_model_has_to_fit(tmp_path, small_exports):
    folder, config = f"{small_exports}/model", load_config(f"{small_exports}/model")
    device = torch.device("cpu")
    model = load_model(folder, config)
    for changed, message in (
        ({"id2label": {0: "a", 1: "b"}}, "its labels differ"),
        ({"vocab_size": config.vocab_size + 1}, "its vocabulary differs"),
    ):
        model.config.update(changed)
        model.config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"--smaller {tmp_path}: {message}"):
            benchmark.Smaller.load("smaller", str(tmp_path), load_config(folder), 10, device)
        model.config = load_config(folder)
    with pytest.raises(InputError, match=f"it takes {max_tokens(config)} tokens; a text has 100000"):
        benchmark.Smaller.load("smaller", folder, config, 100_000, device)


def test_folders_are_named_by_what_differs():
    assert labels([]) == []  # no --smaller
    assert labels(["runs/a/two_stage", "runs/b/two_stage"]) == ["a", "b"]
