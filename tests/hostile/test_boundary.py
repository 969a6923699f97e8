"""The boundary around loading: a library's words become one line, faults of our own stay; and names of no folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config, tiny_model

from deebert.modeling import checkpoints
from deebert.modeling.checkpoints import load_config, load_model
from deebert.runtime.exported import exported_config, graph_facts
from deebert.utils.errors import InputError


def raiser(error: BaseException, module: str):
    """A function of that module which raises the error."""
    names = {"__name__": module, "error": error}
    exec("def fail(*_, **__):\n    raise error", names)
    return names["fail"]


@pytest.mark.parametrize(
    ("error", "module", "hidden"),
    [
        (KeyError("x"), "transformers.x", True),
        (AssertionError(), "transformers.x", True),
        (RuntimeError("a\n" + "long " * 500), "torch.x", True),
        (KeyError("x"), "deebert.modeling.classifier", False),
        (AssertionError(), "deebert.modeling.classifier", False),
        (ValueError("said about the input"), "deebert.modeling.config", True),
        (MemoryError(), "transformers.x", False),
        (torch.OutOfMemoryError("no memory"), "torch.x", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "torch.x", False),
        (KeyboardInterrupt(), "transformers.x", False),
        (SystemExit(3), "transformers.x", False),
    ],
    ids=repr,
)
def test_only_a_librarys_words_about_a_file_become_one_line(error, module, hidden, tmp_path, monkeypatch):
    tiny_model("bert", num_hidden_layers=1).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    monkeypatch.setattr(checkpoints.MODELS["bert"][1], "from_pretrained", raiser(error, module))
    with pytest.raises(InputError if hidden else type(error)) as caught:
        load_model(str(tmp_path), config)
    assert isinstance(caught.value, InputError) == hidden
    if hidden:
        assert caught.value.__cause__ is error
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["./saved_model", "saved_model/", "a/b/c", "~/model", "/saved model/x"])
def test_a_folder_that_is_not_there(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{re.escape(name)}: no such folder$"):
        load_config(name)


def test_a_folder_that_is_not_there_beside_models(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints.PreTrainedConfig, "get_config_dict", lambda *_, **__: ({"model_type": "gpt2"}, {}))
    Path("models/bert").mkdir(parents=True)
    with pytest.raises(InputError, match="a gpt2 checkpoint"):  # the hub's
        load_config("models/bart")
    Path("models/bert/config.json").touch()
    with pytest.raises(InputError, match=r"^models/bart: no such folder; models has models here, so the hub is not"):
        load_config("models/bart")


GRAPH_CHANGES = {
    "model_type": {"model_type": "roberta"},
    "num_labels": {"id2label": {"0": "a", "1": "b", "2": "c"}},
    "highway_pooling": {"highway_pooling": "mean"},
    "highway_head": {"highway_head": "linear"},
    "hidden_size": {"hidden_size": 64},
    "pad_token_id": {"pad_token_id": 3},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "problem_type": {"problem_type": "multi_label_classification"},
}


@pytest.mark.parametrize("field", GRAPH_CHANGES)
def test_an_exports_config_must_be_what_its_graph_was_made_with(field, tmp_path):
    config = tiny_config("bert")
    manifest = json.loads(json.dumps({"config": graph_facts(config)}))
    facts = json.loads(config.to_json_string(use_diff=False))
    free = {"exit_threshold": 0.3, "exit_rule": "confidence", "id2label": {"0": "bad", "1": "good"}}
    for changes, wrong in ((free, False), (GRAPH_CHANGES[field], True)):
        (tmp_path / "config.json").write_text(json.dumps(facts | changes))
        if not wrong:
            config = exported_config(tmp_path, manifest)
            assert (config.exit_threshold, config.exit_rule) == (0.3, "confidence")
            assert config.id2label == {0: "bad", 1: "good"}
            continue
        with pytest.raises(InputError, match=f"config.json: {field} is .*, but the graph was made with") as caught:
            exported_config(tmp_path, manifest)
        assert "run python -m deebert export again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": 5}, "id2label is 5; give a name for each output"),
        ({"early_exit_entropy": 0.3, "exit_threshold": 0.4}, "early_exit_entropy is 0.3, and exit_threshold, the same"),
    ],
)
def test_an_exports_config_that_means_nothing(tmp_path, changes, message):
    config = tiny_config("bert")
    facts = json.loads(config.to_json_string(use_diff=False)) | changes
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=f"config.json: {message}"):
        exported_config(tmp_path, json.loads(json.dumps({"config": graph_facts(config)})))
