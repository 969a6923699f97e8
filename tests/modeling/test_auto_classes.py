"""A saved folder in transformers' own hands: auto classes, pipelines, remote code, stock classes, the hub."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.helpers import ROOT
from support.tiny import CLASSES, random_batch, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, pipeline
from transformers.utils import hub

from deebert.modeling.auto_classes import when_imported
from deebert.modeling.checkpoints import save_model

STOCK = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}


@pytest.fixture
def folder(tmp_path, backbone):
    """A saved model whose samples all exit at the first off-ramp."""
    model = tiny_model(backbone, num_hidden_layers=3, exit_threshold=10.0)
    save_model(model, tiny_tokenizer(backbone), tmp_path / "model")
    return tmp_path / "model"


def exits_early(model) -> bool:
    with torch.no_grad():
        return model.eval()(**random_batch(model.config, [4, 9])).exit_layer.tolist() == [1, 1]


def test_the_auto_class_gives_a_model_that_exits(folder, backbone, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is CLASSES[backbone][1]
    assert exits_early(model)
    model.save_pretrained(tmp_path / "again")
    assert exits_early(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"))
    assert exits_early(AutoModelForSequenceClassification.from_config(tiny_config(backbone, exit_threshold=10.0)))
    assert type(AutoModel.from_config(model.config)) is type(model.base_model)


def test_a_pipeline_of_the_folder_exits(folder, backbone, caplog):
    classify = pipeline("text-classification", model=str(folder))
    ran = []
    classify.model.base_model.encoder.layer[1].register_forward_hook(lambda *_: ran.append(1))
    assert len(classify(["a good film", "so very bad"])) == 2
    assert not ran
    assert "not supported" not in caplog.text


def test_folders_of_before_load_too(folder, backbone):
    """0.6 saved neither the file for remote code nor HF's head."""
    (folder / "modeling_deebert.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert exits_early(AutoModelForSequenceClassification.from_pretrained(folder))


def test_plain_checkpoints_load_as_before(backbone, tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)  # no architectures in it
    assert type(model) is transformers.BertForSequenceClassification
    model.save_pretrained(tmp_path)
    for trust in (None, True):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(again) is transformers.BertForSequenceClassification


def test_stock_classes_read_the_folder_as_the_full_model(folder, backbone):
    ours = CLASSES[backbone][1].from_pretrained(folder).eval()
    stock, info = getattr(transformers, STOCK[backbone]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    batch = random_batch(ours.config, [4, 9])
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(**batch).logits, ours(**batch, exit_threshold=-1).logits)


def test_weights_with_the_stock_head_fit_our_model(folder, backbone):
    from safetensors.torch import load_model

    assert load_model(tiny_model(backbone, seed=1, num_hidden_layers=3), folder / "model.safetensors") == (set(), [])


def test_a_checkpoint_of_another_architecture_is_refused(folder, backbone):
    other = "roberta" if backbone == "bert" else "bert"
    config_class, model_class = CLASSES[other]
    message = f"a {backbone} checkpoint; {model_class.__name__} reads {other} checkpoints"
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(folder)
    stock = next(base for base in CLASSES[backbone][0].__mro__ if base.__module__.startswith("transformers."))
    for config in (tiny_config(backbone), stock(num_hidden_layers=1)):
        with pytest.raises(ValueError, match=message):
            model_class(config)


SCRIPTS = {
    "remote code": """
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer
assert type(Auto.from_pretrained(folder)).__module__.startswith("transformers.")
model = Auto.from_pretrained(folder, trust_remote_code=True)
""",
    "import deebert": """
import deebert
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoTokenizer, BertTokenizerFast, BertConfig
assert "deebert.modeling.backbones.bert" not in sys.modules
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained(folder)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SCRIPTS)
@pytest.mark.parametrize("backbone", ["roberta"], indirect=True)
def test_in_a_process_of_its_own(folder, how, tmp_path):
    end = """
print(type(model).__name__)
print(model(**AutoTokenizer.from_pretrained(folder)("so good", return_tensors="pt")).exit_layer.tolist())
model.save_pretrained(folder + "_again")
"""
    code = f"import sys\nfolder = {str(folder)!r}\n{SCRIPTS[how]}{end}"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DeeRobertaForSequenceClassification", "[1]"]
    saved = {path.name for path in tmp_path.glob("model_again/*")}
    assert saved == {"config.json", "model.safetensors", "modeling_deebert.py"}
    source = {
        name: json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("model", "model_again")
    }
    assert source["model"] == source["model_again"]


def test_what_is_pushed_to_the_hub_exits_early_there(folder, backbone, tmp_path, monkeypatch):
    """The hub's client is replaced by one that copies the files of a commit into a folder."""
    pushed = tmp_path / "hub"
    pushed.mkdir()

    def create_commit(repo_id, operations, **_):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, pushed / operation.path_in_repo)

    client = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), create_commit=create_commit
    )
    monkeypatch.setattr(hub, "hf_api", lambda: client)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    CLASSES[backbone][1].from_pretrained(folder).push_to_hub("owner/model")
    AutoTokenizer.from_pretrained(folder).push_to_hub("owner/model")
    assert (pushed / "modeling_deebert.py").is_file()
    assert exits_early(AutoModelForSequenceClassification.from_pretrained(pushed))
    assert AutoTokenizer.from_pretrained(pushed)("a good film")["input_ids"]


def test_a_hook_waits_for_a_module(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("awaited_module", lambda module: seen.append(module.value))
    assert seen == []
    import awaited_module

    assert seen == [3]
    when_imported("awaited_module", lambda module: seen.append(module))
    assert seen == [3, awaited_module]
    monkeypatch.delitem(sys.modules, "awaited_module")
    __import__("awaited_module")
    assert len(seen) == 2  # once is enough
