"""Hostile and damaged model folders: each loads and classifies sanely, or gets one line that names the folder."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_model, tiny_tokenizer

from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, save_model
from deebert.modeling.config_checks import check_labels
from deebert.utils.errors import InputError

LOADS = None  # in place of the expected message
LAYERS = 3


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The folder that every case damages: a BERT of three layers."""
    folder = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = tiny_model("bert", num_hidden_layers=LAYERS, exit_threshold=0.5, **sizes)
    save_model(model, tiny_tokenizer("bert"), folder)
    return folder


def classify(folder: Path) -> torch.Tensor:
    """What every command does with a folder: config, tokenizer, weights, one pass. The probabilities (1, C)."""
    config, tokenizer = load_config(str(folder)), load_tokenizer(str(folder))
    model = load_model(str(folder), config).eval()
    with torch.no_grad():
        return model(**tokenizer(["a good film"], return_tensors="pt")).logits.softmax(-1)


def outcome(folder: Path, message: str | None, record_property) -> None:
    if message is LOADS:
        record_property("came_back", "loads, and classifies sanely")
        assert classify(folder).isfinite().all()
        return
    with pytest.raises(InputError, match=message) as caught:
        classify(folder)
    line = str(caught.value)
    assert str(folder) in line
    assert "\n" not in line
    assert len(line) < 500 + len(str(folder))


DEEP = "[" * 100_000
CONFIG_FIELDS = [  # field, value, message
    *(("num_hidden_layers", value, "num_hidden_layers") for value in (0, -1, "3", 3.0, None, [3], 10**6, 10**400)),
    *(("num_hidden_layers", value, f"weights of 3 layers, but a config.json of {value}") for value in (1, 2, 4, 200)),
    *(("exit_threshold", value, "exit_threshold is") for value in (None, "0.3", 10**400, [[0.1]], {}, True, [None])),
    *(("exit_threshold", value, "exit_threshold") for value in (["0.3", "0.3"], float("nan"), [0.1], [0.1] * 4)),
    *(("exit_threshold", value, LOADS) for value in (float("inf"), -float("inf"), 1e300, 0, [0.1, 0.2], [0.1] * 3)),
    ("early_exit_entropy", 0.5, LOADS),
    ("early_exit_entropy", 0.3, "early_exit_entropy is 0.3, and exit_threshold, the same, is 0.5; remove one"),
    *(("exit_rule", value, "exit_rule is") for value in (None, [], {}, 3, "boredom", "")),
    ("exit_rule", "learned", "exit_rule is 'learned'; choose one of"),
    ("exit_rule", "patience", "patience counts"),
    ("exit_rule", "confidence", LOADS),
    *(("highway_pooling", value, "highway_pooling is") for value in (None, [], 3, "last")),
    ("highway_pooling", "mean", LOADS),
    *(("highway_head", value, "highway_head is") for value in (None, [], 3, "tail")),
    *(("patience_tolerance", value, "patience_tolerance is") for value in (None, "a", -1, float("nan"), [0.5])),
    *(("id2label", value, "id2label") for value in ({"1": "a", "2": "b"}, {"a": "b"}, {}, "ab", ["a", "b"])),
    ("id2label", {"0": "a", "1": "a"}, "id2label has 'a' more than once"),
    ("id2label", {"0": "a", "1": "b\ud800"}, "which is no Unicode text"),
    ("id2label", {"0": 1}, "at least two labels"),
    ("id2label", {"0": "a", "1": "b", "2": "c"}, "weights do not load"),
    ("id2label", {"0": "a\tb", "1": "c\nd"}, LOADS),
    ("return_dict", False, LOADS),
    ("use_cache", True, LOADS),
    ("unknown_field", {"deep": [1, 2]}, LOADS),
    *(("model_type", value, "checkpoint") for value in (None, "t5", [], {}, 3, "", "deebert")),
    ("model_type", "roberta", "weights|tokenizer|not a trained"),
    ("hidden_size", 0, "config.json|weights"),
    *(("hidden_size", value, "hidden_size|weights do not load") for value in (-8, 7, "8", None, 10, 16)),
    *(("num_attention_heads", value, "weights do not load|attention") for value in (0, 3, "2", None, -2)),
    *(("vocab_size", value, "vocab_size|weights do not load") for value in (0, 10, -5, "300", None)),
    *(("intermediate_size", value, "intermediate_size|weights do not load") for value in (0, 9, None)),
    *(("max_position_embeddings", value, "max_position|weights do not load") for value in (0, 5, None)),
    *(("type_vocab_size", value, "type_vocab_size|weights do not load") for value in (0, 1, None)),
    *(("hidden_act", value, "hidden_act|weights do not load") for value in ("nope", 3, None, [])),
    *(("hidden_dropout_prob", value, "hidden_dropout_prob|weights do not load") for value in ("a", None, 7.0)),
    *(("layer_norm_eps", value, "layer_norm_eps|weights do not load") for value in ("a", None)),
    *(("classifier_dropout", value, "classifier_dropout|weights do not load") for value in ("a", 9.0)),
    *((name, 10**12, "weights do not load|config.json") for name in ("hidden_size", "vocab_size", "intermediate_size")),
    *(("pad_token_id", value, "pad_token_id is") for value in (None, -1)),
    ("pad_token_id", 10**9, "pad_token_id|weights do not load"),
    ("problem_type", "nonsense", "problem_type"),
    *(("attn_implementation", name, "choose one of eager, sdpa") for name in ("someone/kernels", "x@y:z", 3, ["sdpa"])),
    ("attn_implementation", "eager", LOADS),
    ("chunk_size_feed_forward", 7, "chunk_size_feed_forward is 7; give 0"),
    ("chunk_size_feed_forward", 1, LOADS),
    ("dtype", "float99", "float99"),
    ("dtype", "float16", LOADS),
    ("architectures", "BertForSequenceClassification", LOADS),
    ("auto_map", {"AutoConfig": "evil.Config"}, LOADS),
    ("auto_map", None, "tokenizer"),
    ("quantization_config", {"quant_method": "nope"}, LOADS),
]


@pytest.mark.parametrize(("field", "value", "message"), CONFIG_FIELDS, ids=lambda value: str(value)[:24])
@pytest.mark.hostile("model folder", "one line")
def test_a_field_of_config_json(good, tmp_path, record_property, field, value, message):
    folder = shutil.copytree(good, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    outcome(folder, message, record_property)


FILES = [  # file, bytes (None: it is removed), message
    *(
        ("config.json", text, "config.json")
        for text in (b"", b"null", b'"x"', b"3", b"[]", b"{", b"\xff\xfe", DEEP.encode())
    ),
    ("config.json", None, "no config.json there"),
    ("config.json", b"{}", "config.json"),
    ("config.json", b'{"model_type": "bert"}', "weights of 3 layers, but a config.json of 12"),
    *(("tokenizer.json", text, "tokenizer") for text in (b"", b"{}", b"null", b"[]", b"{", b"\xff", b'{"model": 3}')),
    ("tokenizer.json", None, "tokenizer.json is missing"),
    *(("tokenizer_config.json", text, "tokenizer") for text in (b"", b"[]", b"null", b'"x"', b"{", b"\xff")),
    ("tokenizer_config.json", b'{"tokenizer_class": 3}', "tokenizer"),
    ("tokenizer_config.json", b'{"model_max_length": "many"}', "tokenizer"),
    *(("model.safetensors", text, "weights do not load") for text in (b"", b"x", b"\xff" * 100, b"\0" * 100)),
    ("model.safetensors", (2**60).to_bytes(8, "little") + b"{}", "weights do not load"),
    ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "not a trained DeeBERT|weights"),
    ("model.safetensors", None, "weights do not load"),
    ("modeling_deebert.py", b"raise SystemExit", LOADS),
    ("README.md", b"\xff", LOADS),
]


@pytest.mark.parametrize(("file", "content", "message"), FILES, ids=lambda value: str(value)[:24])
@pytest.mark.hostile("model folder", "one line")
def test_a_damaged_file(good, tmp_path, record_property, file, content, message):
    folder = shutil.copytree(good, tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    outcome(folder, message, record_property)


class Bomb:
    """A pickle that would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def saved_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Bomb(folder / "exploded")}, folder / "pytorch_model.bin")


def as_pickle(folder: Path, **changes) -> None:
    torch.save(load_file(folder / "model.safetensors") | changes, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def fewer_layers_than_the_pickle(folder: Path) -> None:
    as_pickle(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


def weights(change):
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def other_shape(state: dict) -> None:
    state["classifier.weight"] = torch.zeros(3, 3)


def other_names(state: dict) -> None:
    for name in list(state):
        state[name.replace("bert.", "roberta.")] = state.pop(name)


def of_a_data_parallel_model(state: dict) -> None:
    for name in list(state):
        state[f"module.{name}"] = state.pop(name)


def index_of(weight_map: str):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')

    return damage


def folder_in_place_of(file: str):
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def link_to_itself(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


DAMAGES = [
    (truncate, "weights do not load"),
    (pickled, "weights do not load"),
    (saved_bomb, "weights do not load: a pickle that holds more than tensors, which is not read; copy"),
    (as_pickle, LOADS),
    (fewer_layers_than_the_pickle, "weights of 3 layers, but a config.json of 2"),
    (weights(lambda state: state.pop("classifier.bias")), "it has no classifier.bias"),
    (weights(lambda state: state.pop("bert.embeddings.word_embeddings.weight")), "it has no bert.embeddings"),
    (weights(lambda state: state.clear()), "not a trained DeeBERT"),
    (weights(lambda state: state.update(extra=torch.zeros(2))), LOADS),
    (weights(other_shape), "weights do not load"),
    (weights(other_names), "not a trained DeeBERT"),
    (weights(of_a_data_parallel_model), "begin with 'module.', as DataParallel names them; save the state_dict"),
    (index_of('{"classifier.bias": "../../etc/passwd"}'), "weights"),
    *((index_of(value), "no weight_map of names and files in it") for value in ("[1]", "null", "3", '"x"')),
    (folder_in_place_of("config.json"), "config.json"),
    (folder_in_place_of("model.safetensors"), "weights do not load"),
    (folder_in_place_of("tokenizer.json"), "tokenizer.json is missing"),
    (link_to_itself, "weights do not load"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.hostile("model folder", "one line")
def test_a_damaged_folder(good, tmp_path, record_property, damage, message):
    folder = shutil.copytree(good, tmp_path / "model")
    damage(folder)
    outcome(folder, message, record_property)
    assert not (folder / "exploded").exists()


def test_labels_by_the_ten_thousand_are_checked_in_a_moment():
    labels = {i: f"label {i}" for i in range(50_000)}
    check_labels(labels)
    with pytest.raises(ValueError, match="id2label has 'label 7' more than once"):
        check_labels(labels | {49_999: "label 7"})
