"""What an exported model says about itself, read without PyTorch and transformers.

The manifest holds what the graph was made with and how texts become its tokens. config.json beside it holds what may be
edited later: threshold, exit rule, names of labels.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from tokenizers import Tokenizer

from deebert.modeling.config import MANIFEST, ExitFields, config_cutoffs
from deebert.modeling.config_checks import ALIASES, check_fields, check_labels, check_stored
from deebert.utils.arrays import Array
from deebert.utils.errors import InputError, one_line
from deebert.utils.files import read_json


@dataclass
class ExitOutput:
    """`HighwayClassifierOutput` of models that run without PyTorch: arrays of numpy, or tensors.

    logits: (B, C). exit_layer: (B,). entropy: (B,). all_logits: (B, E, C), only if requested.
    """

    logits: Array | None = None
    exit_layer: Array | None = None
    entropy: Array | None = None
    all_logits: Array | None = None


FORMAT = 5  # raise it when OnnxDeeBert can no longer run earlier exports
GRAPH = "model.onnx"
EDITABLE = ("exit_threshold", "exit_rule", "patience_tolerance", "min_confidence", "max_seq_length", "id2label")
AGAIN = "run python -m deebert export again"


@dataclass(kw_only=True)
class ExportedConfig(ExitFields):
    """The config of an exported model: fields of transformers' config, by the names that all encoders have."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int
    pad_token_id: int
    num_labels: int
    problem_type: str | None
    gated_mlp: bool
    first_token_only: bool
    linear_classifier: bool = False
    id2label: dict[int, str]


GRAPH_FACTS = {field.name for field in fields(ExportedConfig)} - {*EDITABLE}  # all but what may be edited later
NEW_FACTS = {"classifier_pooling", "linear_classifier"}  # that exports of 0.10 do not have
ENCODING = {"max_tokens", "pad_id", "has_token_types", "truncation_side"}  # arguments of TextEncoder


def graph_facts(config) -> dict:
    """What a graph is made with, from a model's config."""
    return {name: getattr(config, name) for name in GRAPH_FACTS}


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds a graph for ONNX Runtime rather than a PyTorch model."""
    return Path(folder, MANIFEST).is_file() or Path(folder, GRAPH).is_file()


def read_manifest(folder: Path) -> dict:
    """The manifest of an export. Raises InputError where the folder is incomplete or of another version."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no {MANIFEST} there, so no complete export; run python -m deebert export")
    manifest, damaged = read_json(folder / MANIFEST, advice=AGAIN), f"{folder / MANIFEST}: damaged"
    if not {"deebert", "format"} <= manifest.keys():
        raise InputError(f"{damaged}; {AGAIN}")
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{folder}: exported by version {manifest['deebert']} (format {manifest['format']}, this one reads "
            f"{FORMAT}); {AGAIN}"
        )
    made_with, encoding = manifest.get("config"), manifest.get("encoding")
    sound = {"precision", "exit_rule"} <= manifest.keys() and isinstance(made_with, dict) and isinstance(encoding, dict)
    if not sound or made_with.keys() | NEW_FACTS != GRAPH_FACTS or encoding.keys() != ENCODING:
        raise InputError(f"{damaged}; {AGAIN}")
    if encoding["pad_id"] not in range(made_with["vocab_size"]):
        raise InputError(f"{damaged}: pad_id is {encoding['pad_id']}, which is no token of the model; {AGAIN}")
    for name in ("config.json", "tokenizer.json", GRAPH):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; the export is incomplete, {AGAIN}")
    return manifest


def exported_config(folder: Path, manifest: dict) -> ExportedConfig:
    """The config of an export. Raises InputError where config.json is damaged or differs from the graph's."""
    file = folder / "config.json"
    facts = read_json(file, advice=AGAIN)
    stored = {ALIASES.get(name, name): value for name, value in facts.items()}
    older = {"linear_classifier": False, "classifier_pooling": stored.get("classifier_pooling", "cls")}
    made_with = older | manifest["config"]
    labels = stored.get("id2label") or {i: f"LABEL_{i}" for i in range(made_with["num_labels"])}
    try:
        check_stored(facts | made_with)
        check_labels(labels)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    for name, value in (stored | {"num_labels": len(labels)}).items():
        if made_with.get(name, value) != value:
            raise InputError(
                f"{file}: {name} is {value!r}, but the graph was made with {made_with[name]!r}; set it back, or {AGAIN}"
            )
    edited = {name: stored[name] for name in EDITABLE if name in stored} | {"id2label": labels}
    try:
        config = ExportedConfig(**made_with, **edited)
        check_fields(config)
        config_cutoffs(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {error}; correct it there") from None
    config.id2label = {int(number): label for number, label in labels.items()}
    return config


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an export. Raises InputError."""
    with one_line(f"{folder / 'tokenizer.json'}: no tokenizer that can be read", AGAIN):
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
