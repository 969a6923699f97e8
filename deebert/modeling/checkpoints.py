"""Loading and saving models with their tokenizers, with one clear line for whatever can be wrong with a checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from deebert.modeling.bert import DeeBertConfig, DeeBertForSequenceClassification
from deebert.modeling.config import config_cutoffs
from deebert.modeling.off_ramps import is_off_ramp
from deebert.modeling.roberta import DeeRobertaConfig, DeeRobertaForSequenceClassification
from deebert.utils.cli import InputError

MODELS = {
    "bert": (DeeBertConfig, DeeBertForSequenceClassification),
    "roberta": (DeeRobertaConfig, DeeRobertaForSequenceClassification),
}

# what `deebert export` writes: the manifest is written last, so that a folder with one is complete
MANIFEST, GRAPH = "deebert_onnx.json", "layers.onnx"
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def quiet_transformers() -> None:
    """Switches transformers' own reports and progress bars off: the commands say what they load and save."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def disable_cudnn_attention() -> None:
    """Keeps PyTorch from cuDNN's attention, which makes a plan for every new shape of a batch, and we have many.

    Measured on an H100 in bfloat16 it tripled the time of a training, and passes took up to ten times as long.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_config(name_or_path: str, model_type: str | None = None, cache_dir: str | None = None):
    """The config of a BERT or RoBERTa checkpoint, with the fields of early exit.

    model_type: what it has to be; None: whatever the checkpoint says. Raises InputError.
    """
    if is_path(name_or_path) and not Path(name_or_path).exists():
        raise InputError(f"{name_or_path}: no such folder")  # the hub's client would look for it there, more than once
    try:
        facts, _ = PreTrainedConfig.get_config_dict(name_or_path, cache_dir=cache_dir)
    except OSError as error:
        raise InputError(
            f"{name_or_path}: neither a model folder with a config.json nor a model on the hub ({error})"
        ) from None
    if not facts:
        raise InputError(f"{name_or_path}: a folder without a config.json, so no model")
    kind = facts.get("model_type", model_type)
    if kind not in MODELS:
        raise InputError(
            f"{name_or_path}: a {kind or 'nameless'} checkpoint; DeeBERT takes {' or '.join(MODELS)} checkpoints"
        )
    if model_type not in (None, kind):
        raise InputError(
            f"{name_or_path}: a {kind} checkpoint, but --model_type is {model_type}; use --model_type {kind}"
        )
    config = MODELS[kind][0].from_dict(facts)
    try:
        config_cutoffs(config)
    except ValueError as error:
        raise InputError(f"{name_or_path}/config.json: {error}") from None
    if config.exit_temperatures is not None and len(config.exit_temperatures) != config.num_hidden_layers:
        raise InputError(
            f"{name_or_path}/config.json: {len(config.exit_temperatures)} exit_temperatures for "
            f"{config.num_hidden_layers} exits"
        )
    return config


def is_path(name_or_path: str) -> bool:
    """Whether a folder is meant: the hub's names are `model` and `owner/model`, and few owners are folders here."""
    parts = Path(name_or_path).parts
    return str(name_or_path).startswith((".", "/")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def check_threshold(value: float, config) -> None:
    """Raises InputError where a model of this config cannot exit at --exit_threshold `value`."""
    try:
        config_cutoffs(config, value)
    except ValueError as error:
        raise InputError(f"--exit_threshold {value}: {error}") from None


def set_labels(config, labels: Sequence[str], problem_type: str | None = None) -> None:
    """Writes the task's labels, in the order of the outputs, into a config; () for regression.

    problem_type: Hugging Face's name; None: a single label each, or regression.
    """
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    else:
        config.num_labels = 1
    config.problem_type = problem_type or ("single_label_classification" if labels else "regression")


def load_tokenizer(
    name_or_path: str, do_lower_case: bool = False, cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's fast tokenizer. do_lower_case forces what an uncased checkpoint does by itself."""
    options, folder = {"do_lower_case": True} if do_lower_case else {}, Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(f"{folder}: no tokenizer there; tokenizer.json is missing")  # transformers would invent one
    try:
        return AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{name_or_path}: no tokenizer there ({error})") from None


def max_tokens(config) -> int:
    """The longest sequence that the model has positions for. RoBERTa's begin after the padding token's."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds a graph for ONNX Runtime rather than a PyTorch model."""
    return Path(folder, MANIFEST).is_file() or Path(folder, GRAPH).is_file()


def load_model(name_or_path: str, config, cache_dir: str | None = None):
    """A trained model. Raises InputError where the checkpoint lacks weights: they would be random."""
    model, missing = _load(name_or_path, config, cache_dir)
    if missing and all(".learn_to_exit." in name for name in missing):
        raise InputError(f"{name_or_path}: trained without --exit_rule learned, so it cannot exit by it")
    if missing:
        raise InputError(
            f"{name_or_path}: not a trained DeeBERT, it has no {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; train it with scripts/train_deebert.sh"
        )
    return model


def load_pretrained(name_or_path: str, config, cache_dir: str | None = None):
    """A model to be trained, and the names of its weights that are new.

    New off-ramps begin with copies of the model's pooler, where the checkpoint has one.
    """
    model, missing = _load(name_or_path, config, cache_dir)
    unknown = [name for name in missing if not (name.startswith("classifier.") or is_off_ramp(name))]
    if any(".pooler." not in name for name in unknown):
        raise InputError(f"{name_or_path}: its weights lack {unknown[0]} and are no {config.model_type}")
    if any(".highway." in name and ".pooler." in name for name in missing) and not unknown:
        model.base_model.init_highway_pooler()
    return model, missing


def _load(name_or_path: str, config, cache_dir: str | None):
    if Path(name_or_path, MANIFEST).is_file():
        raise InputError(
            f"{name_or_path}: exported for ONNX Runtime; give the trained model that the export was made of"
        )
    try:
        model, info = MODELS[config.model_type][1].from_pretrained(
            name_or_path, config=config, cache_dir=cache_dir, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{name_or_path}: its weights do not load ({error})") from None
    return model, sorted(info["missing_keys"])


def save_model(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into a temporary folder, then renames the files into place."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # config.json last: where it is, the scripts take the model to be there
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)
