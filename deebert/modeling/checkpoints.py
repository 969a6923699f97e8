"""Loading and saving models with their tokenizers, with one clear line for whatever can be wrong with a checkpoint."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from deebert.modeling.backbones import MODELS
from deebert.modeling.config import MANIFEST, config_cutoffs
from deebert.modeling.config_checks import check_fields
from deebert.modeling.off_ramps import HighwayPooler, is_off_ramp
from deebert.utils.errors import InputError, one_line
from deebert.utils.files import adding_files

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
LAYER = re.compile(r"\.layers?\.(\d+)\.")


def quiet_transformers() -> None:
    """Switches transformers' own reports and progress bars off: the commands say what they load and save."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def disable_cudnn_attention() -> None:
    """Keeps PyTorch from cuDNN's attention, which makes a plan for every new shape of a batch, and we have many.

    Measured on an H100 in bfloat16 it tripled the time of a training, and passes took up to ten times as long.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_path(name_or_path: str) -> None:
    """Raises InputError for the path of a folder that is not there; `model` and `owner/model` are names of the hub.

    But where the folder `owner` here has models, it is a path: without a network the hub takes half a minute to fail.
    """
    if Path(name_or_path).exists():
        return
    if name_or_path.startswith((".", "/", "~")) or name_or_path.endswith("/") or name_or_path.count("/") > 1:
        raise InputError(f"{name_or_path}: no such folder")
    owner = Path(name_or_path).parent
    if "/" in name_or_path and any(owner.glob("*/config.json")):
        raise InputError(f"{name_or_path}: no such folder; {owner} has models here, so the hub is not searched for it")


def problem_of(name_or_path: str, of_folder: str) -> str:
    """What is wrong where a folder, or else a model of the hub, cannot be read."""
    problem = of_folder if Path(name_or_path).exists() else "no such folder here, and the hub gives no such model"
    return f"{name_or_path}: {problem}"


def load_config(name_or_path: str, model_type: str | None = None, cache_dir: str | None = None):
    """The config of a checkpoint of a known backbone, with the fields of early exit.

    model_type: what it has to be; None: whatever the checkpoint says. Raises InputError.
    """
    check_path(name_or_path)
    fix = "give the folder of a model with an undamaged config.json"
    with one_line(problem_of(name_or_path, "its config.json cannot be read"), fix):
        facts, _ = PreTrainedConfig.get_config_dict(name_or_path, cache_dir=cache_dir)
    if not facts and not Path(name_or_path, "config.json").is_file():
        raise InputError(f"{name_or_path}: no config.json there, so no model, or none whose training is finished")
    if not facts or not isinstance(facts, dict):
        raise InputError(f"{name_or_path}/config.json: no settings in it; {fix}")
    kind = facts.get("model_type", model_type)
    if kind not in list(MODELS):
        raise InputError(
            f"{name_or_path}: a {kind or 'nameless'} checkpoint; DeeBERT takes {', '.join(MODELS)}; "
            "docs/add_an_encoder.md says how to add one"
        )
    if model_type not in (None, kind):
        raise InputError(f"{name_or_path}: a {kind} checkpoint, but the model type is {model_type}; give {kind}")
    with one_line(f"{name_or_path}/config.json", "correct it there"):
        config = MODELS[kind][0].from_dict(facts)
        check_fields(config)
        config_cutoffs(config)
    config.return_dict = True  # we read outputs by their names
    return config


def check_threshold(value: float, config) -> None:
    """Raises InputError where a model of this config cannot exit at this threshold."""
    try:
        config_cutoffs(config, value)
    except ValueError as error:
        raise InputError(f"exit_threshold {value}: {error}") from None


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
    check_path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(f"{folder}: no tokenizer there; tokenizer.json is missing")  # transformers would invent one
    fix = "copy the tokenizer's files from the model that was trained"
    with one_line(problem_of(name_or_path, "no tokenizer there that can be read"), fix):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, **options)
        tokenizer("a trial", truncation=True)
    if not tokenizer.is_fast:
        raise InputError(f"{name_or_path}: no fast tokenizer there (tokenizer.json)")
    return tokenizer


def max_tokens(config) -> int:
    """The longest sequence that the model has positions for. RoBERTa's begin after the padding token's."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.positions_after_padding else 0)


def encoding_facts(config, tokenizer: PreTrainedTokenizerBase) -> dict:
    """How texts become a model's tokens: arguments of `TextEncoder`."""
    return {
        "max_tokens": max_tokens(config),
        "pad_id": tokenizer.pad_token_id,
        "has_token_types": config.type_vocab_size > 1,
        "truncation_side": tokenizer.truncation_side,
    }


def load_model(name_or_path: str, config, cache_dir: str | None = None):
    """A trained model. Raises InputError where the checkpoint lacks weights: they would be random."""
    model, missing = _load(name_or_path, config, cache_dir)
    if missing:
        raise InputError(
            f"{name_or_path}: not a trained DeeBERT, it has no {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; train it with scripts/train_deebert.sh"
        )
    return model


def load_pretrained(name_or_path: str, config, cache_dir: str | None = None, other_labels: bool = False):
    """A model to be trained, and the names of its weights that are new. The config may have fewer layers.

    New off-ramps begin with copies of the model's pooler, where the checkpoint has one. Classifiers of another number
    of labels are new, too: a model of one task may be the start of another. other_labels: all classifiers are new.
    """
    model, missing = _load(name_or_path, config, cache_dir, trained=False)
    unknown = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and not is_off_ramp(name)]
    if any(".pooler." not in name for name in unknown):
        raise InputError(
            f"{name_or_path}: its weights lack {unknown[0]}, so they are not those of a {config.model_type} model"
        )
    pooler = None if unknown else getattr(model.base_model, "pooler", None)
    for name, module in model.named_modules() if pooler is not None else ():
        if isinstance(module, HighwayPooler) and f"{name}.dense.weight" in missing:
            module.load_state_dict(pooler.state_dict())
    modules = [name for name, module in model.named_modules() if other_labels and isinstance(module, torch.nn.Linear)]
    classifiers = [name for name in modules if re.search(r"(^|\.)classifier(\.out_proj)?$", name)]
    for name in classifiers:
        classifier = model.get_submodule(name)
        torch.nn.init.normal_(classifier.weight, std=config.initializer_range)
        torch.nn.init.zeros_(classifier.bias)
    return model, sorted({*missing, *(f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias"))})


def load_final_classifier(name_or_path: str, config):
    """A fine-tuned classifier with its own weights; off-ramps that it lacks are random. Raises InputError."""
    model, missing = load_pretrained(name_or_path, config)
    lacking = [name for name in missing if not is_off_ramp(name)]
    if lacking and hasattr(model, "load_stock_head"):
        lacking = model.load_stock_head(name_or_path)
    if lacking:
        raise InputError(f"{name_or_path}: not a fine-tuned classifier, it has no {lacking[0]}")
    return model


def _load(name_or_path: str, config, cache_dir: str | None, trained: bool = True):
    if Path(name_or_path, MANIFEST).is_file():
        raise InputError(
            f"{name_or_path}: exported for ONNX Runtime; give the trained model that the export was made of"
        )
    fix = "copy or train the model again"
    with one_line(f"{name_or_path}: its weights do not load", fix):
        check_layers(name_or_path, config, stored_names(Path(name_or_path)), all_layers=trained)
        model, info = MODELS[config.model_type][1].from_pretrained(
            name_or_path,
            config=config,
            cache_dir=cache_dir,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=not trained,
        )
    if any(name.startswith("module.") for name in info["unexpected_keys"]):
        raise InputError(
            f"{name_or_path}: the names of its weights begin with 'module.', as DataParallel names them; save the "
            "state_dict() of the model inside, model.module"
        )
    check_layers(name_or_path, config, info["unexpected_keys"] if trained else [])
    others = sorted(info["mismatched_keys"])  # name, shape in the checkpoint, shape in the model
    for name, stored, wanted in others:
        if "classifier" not in name or stored[1:] != wanted[1:]:
            raise InputError(
                f"{name_or_path}: its weights do not load: {name} is {tuple(stored)}, and its config.json makes it "
                f"{tuple(wanted)}; {fix}"
            )
    return model, sorted([*info["missing_keys"], *(name for name, _, _ in others)])


def stored_names(folder: Path) -> list[str]:
    """The names of the weights in a folder with safetensors, without loading them; [] where there are others."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    if not index.is_file():
        return []
    weight_map = json.loads(index.read_text()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: no weight_map of names and files in it; copy the model again")
    return list(weight_map)


def check_layers(name_or_path: str, config, names: Iterable[str], all_layers: bool = True) -> None:
    """Raises InputError where the weights of these names have fewer layers than the config: some would be random.

    all_layers: where they have more, too. Called before the model is built, which takes hours for a million layers.
    """
    layers = 1 + max((int(match[1]) for name in names if (match := LAYER.search(name))), default=-1)
    wanted = config.num_hidden_layers
    if layers and (layers < wanted or (all_layers and layers > wanted)):
        raise InputError(
            f"{name_or_path}: weights of {layers} layers, but a config.json of {wanted}; set num_hidden_layers back"
        )


def save_model(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into a temporary folder, then renames the files into place. Raises InputError."""
    with (
        one_line(f"{folder}: the model cannot be written", "make room on the disk, or choose another folder"),
        adding_files(folder, last="config.json") as partial,  # which tells the scripts that there is a model
    ):
        write_model(model, tokenizer, partial)


def write_model(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into a folder that no one reads yet."""
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read them
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens(model.config))
    tokenizer.save_pretrained(folder)
