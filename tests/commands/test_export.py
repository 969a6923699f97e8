"""The export command; predictions from its folder; and an incomplete export gets one clear line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.exported import parts_kept_in, run_export
from support.tiny import random_batch, tiny_model, tiny_tokenizer

from deebert.commands import predict
from deebert.modeling.checkpoints import save_model
from deebert.modeling.config import MANIFEST
from deebert.runtime.onnx_runtime import OnnxDeeBert
from deebert.utils import cli
from deebert.utils.errors import InputError


def test_the_command_says_what_it_wrote(small_exports):
    (line,) = (small_exports / "onnx.txt").read_text().splitlines()
    assert re.fullmatch(r"2 layers: .*/onnx/model\.onnx", line)
    written, note = (small_exports / "int8.txt").read_text().splitlines()
    assert re.fullmatch(r"2 layers, int8: .*/int8/model\.onnx", written)
    assert note.startswith("int8 changes some predictions")
    assert not [path for path in small_exports.glob("*/*") if path.name.startswith(".")]


def test_predictions_of_model_and_export_are_the_same(tmp_path, small_exports, monkeypatch, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\nbad\nthe plot was so very very dull and awful\nfine\nnot a lovely scene\n")
    outputs = []
    for folder in ("model", "onnx"):
        argv = ["predict", "--model", str(small_exports / folder), "--file", str(texts), "--batch_size", "2"]
        monkeypatch.setattr("sys.argv", [*argv, "--exit_threshold", "0.55"])
        cli.run(predict.main)
        outputs.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    model, exported = outputs
    assert len(model) == 5
    assert [line[::2] for line in exported] == [line[::2] for line in model]
    np.testing.assert_allclose([float(x[1]) for x in exported], [float(x[1]) for x in model], atol=2e-4)


def test_int8_is_smaller_and_near(small_exports):
    folders = [small_exports / name for name in ("onnx", "int8")]
    full, small = (OnnxDeeBert(folder) for folder in folders)
    assert (full.precision, small.precision) == ("fp32", "int8")
    batch = random_batch(full.config, [4, 9, 12])
    a, b = (one(**batch, output_all_exits=True).all_logits for one in (full, small))
    assert 0 < (a - b).abs().max() < 0.1
    sizes = [sum(file.stat().st_size for file in folder.glob("*.onnx")) for folder in folders]
    assert sizes[1] < sizes[0]


def test_an_incomplete_export_gets_one_clear_line(tmp_path, small_exports):
    shutil.copytree(small_exports, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "onnx" / MANIFEST
    graph = tmp_path / "onnx/model.onnx"
    complete = graph.read_bytes()
    graph.write_bytes(complete[:100])
    with pytest.raises(InputError, match=r"model.onnx: not a graph that ONNX Runtime can read"):
        OnnxDeeBert(tmp_path / "onnx")
    graph.unlink()
    with pytest.raises(InputError, match=r"model.onnx: no such file; the export is incomplete"):
        OnnxDeeBert(tmp_path / "onnx")
    graph.write_bytes(complete)
    config = tmp_path / "onnx/config.json"
    config.rename(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config.json: no such file; the export is incomplete"):
        OnnxDeeBert(tmp_path / "onnx")
    (tmp_path / "config.json").rename(config)
    stored = json.loads(config.read_text())
    assert "auto_map" not in stored
    config.write_text(json.dumps(stored | {"highway_pooling": "first"}))
    with pytest.raises(InputError, match="highway_pooling is 'first', but the graph was made with 'mean'"):
        OnnxDeeBert(tmp_path / "onnx")
    config.write_text(json.dumps(stored | {"exit_threshold": 0.2}))
    assert OnnxDeeBert(tmp_path / "onnx").config.exit_threshold == 0.2
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"format": 0, "deebert": "0.0.1"}))
    with pytest.raises(InputError, match=r"exported by version 0.0.1 \(format 0"):
        OnnxDeeBert(tmp_path / "onnx")
    unknown = (json.dumps(facts | {part: facts[part] | {"colour": 3}}) for part in ("config", "encoding"))
    for damaged in ("", "[1]", '{"format": 1}', *unknown):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            OnnxDeeBert(tmp_path / "onnx")
    manifest.write_text(json.dumps(facts | {"encoding": facts["encoding"] | {"pad_id": 10**9}}))
    with pytest.raises(InputError, match="pad_id is 1000000000, which is no token of the model"):
        OnnxDeeBert(tmp_path / "onnx")
    manifest.unlink()
    with pytest.raises(InputError, match=f"no {MANIFEST} there, so no complete export"):
        OnnxDeeBert(tmp_path / "onnx")
    with pytest.raises(InputError, match=f"no {MANIFEST}"):
        OnnxDeeBert(tmp_path / "model")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        OnnxDeeBert(tmp_path / "nowhere")


@pytest.mark.parametrize("output", ["model", "other model", "settings"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, output, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model("bert", num_hidden_layers=2), tiny_tokenizer("bert"), tmp_path / "model")
    shutil.copytree("model", "other model")
    Path("settings").mkdir()
    Path("settings/config.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit):
        run_export("--model", "model", "--output", output)
    message = f"--output {output}: it holds other files than an export's; choose another folder"
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_export_is_replaced_and_the_line_says_so(tmp_path, small_exports):
    shutil.copytree(small_exports / "onnx", tmp_path / "onnx")
    with parts_kept_in(small_exports / "parts"):
        printed = run_export("--model", small_exports / "model", "--output", tmp_path / "onnx")
    assert printed == f"2 layers: {tmp_path}/onnx/model.onnx (in place of the export that was there)\n"
    assert "in place of" not in (small_exports / "onnx.txt").read_text()


def test_an_export_of_version_0_10_loads_as_it_is(tmp_path, small_exports):
    folder = shutil.copytree(small_exports / "onnx", tmp_path / "onnx")
    manifest, config = (json.loads((folder / name).read_text()) for name in (MANIFEST, "config.json"))
    for name in ("classifier_pooling", "linear_classifier"):  # 0.10 wrote neither
        del manifest["config"][name]
        config.pop(name, None)
    for name, facts in ((MANIFEST, manifest), ("config.json", config)):
        (folder / name).write_text(json.dumps(facts))
    assert OnnxDeeBert(folder).config == OnnxDeeBert(small_exports / "onnx").config
    (folder / "config.json").write_text(json.dumps(config | {"classifier_pooling": "mean"}))  # as a ModernBERT's says
    assert OnnxDeeBert(folder).config.classifier_pooling == "mean"
