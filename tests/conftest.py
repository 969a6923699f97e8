"""Tiny random models, tokenizers and TSV files: everything offline, everything in seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate import Accelerator
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from deebert.data.batching import collator  # noqa: E402
from deebert.modeling.bert import DeeBertConfig, DeeBertForSequenceClassification  # noqa: E402
from deebert.modeling.roberta import DeeRobertaConfig, DeeRobertaForSequenceClassification  # noqa: E402
from deebert.training.stage import StageTraining  # noqa: E402
from deebert.training.train_data import TokenData  # noqa: E402

torch.set_num_threads(1)  # tiny models are faster so, above all beside other work
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)  # the machines are shared and noisy
hypothesis.settings.load_profile("tests")

BACKBONES = ("bert", "roberta")
CLASSES = {
    "bert": (DeeBertConfig, DeeBertForSequenceClassification),
    "roberta": (DeeRobertaConfig, DeeRobertaForSequenceClassification),
}
GOOD, BAD = ("good fine great lovely", "bad poor awful dull")
WORDS = f"{GOOD} {BAD} the a film plot was is very so not and scene actor".split()


def tiny_config(backbone: str, **overrides):
    """4 layers, 32 wide. A large initializer_range makes random off-ramps disagree, as trained ones do."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 66,
        "initializer_range": 0.2,
    }
    if backbone == "roberta":
        settings |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    return CLASSES[backbone][0](**settings | overrides)


def tiny_model(backbone: str, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return CLASSES[backbone][1](tiny_config(backbone, **overrides)).eval()


def train(stage: int, model, features, settings, **callbacks) -> StageTraining:
    """One stage on the CPU."""
    data = TokenData(features, collator(model.config))
    training = StageTraining(stage, model, data, settings, Accelerator(cpu=True))
    training.run(**callbacks)
    return training


def snapshot_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_batch(config, lengths: list[int], seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of these lengths, padded to the longest and `padding` more."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + padding)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.vocab_size, shape, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, config.pad_token_id), "attention_mask": mask}


@pytest.fixture(params=BACKBONES)
def backbone(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's feature cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tiny_tokenizer(backbone: str):
    if backbone == "bert":
        letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters), *'".,']
        vocab = {piece: i for i, piece in enumerate(pieces)}
        return BertTokenizerFast(vocab=vocab, do_lower_case=True, model_max_length=66)
    bpe = ByteLevelBPETokenizer()
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    bpe.train_from_iterator(WORDS, vocab_size=290, special_tokens=list(special.values()))
    bpe.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=64, **special)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder for each backbone with a pretrained-like checkpoint (no off-ramps, no classifier) and a tokenizer."""
    folders = {}
    for backbone in BACKBONES:
        folder = folders[backbone] = tmp_path_factory.mktemp(backbone)
        base = tiny_model(backbone, initializer_range=0.05).base_model
        stock = next(kind for kind in type(base).__mro__ if kind.__module__.startswith("transformers."))
        plain = stock(base.config)
        plain.load_state_dict(base.state_dict(), strict=False)
        plain.save_pretrained(folder)
        tiny_tokenizer(backbone).save_pretrained(folder)
    return folders


def sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of different lengths whose label is what their words say."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    rows = []
    for i in range(n):
        filler = [pick(WORDS[8:]) for _ in range(int(torch.randint(1, 12, (), generator=generator)))]
        rows.append((" ".join([pick((GOOD if i % 2 else BAD).split()), *filler]), i % 2))
    return rows


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with SST-2, MRPC, MNLI and STS-B in GLUE's layout: 48 lines to train on, 20 to score."""
    root = tmp_path_factory.mktemp("glue")

    def write(path: str, header: str, lines: list[str], start: str = "") -> None:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(start + "\n".join([header, *lines]) + "\n", encoding="utf-8")

    for split, n, seed in (("train", 48, 1), ("dev", 20, 2)):
        rows = sentences(n, seed)
        write(f"SST-2/{split}.tsv", "sentence\tlabel", [f"{text}\t{label}" for text, label in rows])
        pairs = [f"{label}\t{i}\t{i}\t{text}\t{text}" for i, (text, label) in enumerate(rows)]
        write(f"MRPC/{split}.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", pairs, start="\ufeff")
        scored = [f"{i}\t{text}\t{text}\t{5 * label - label / (i + 1)}" for i, (text, label) in enumerate(rows)]
        write(f"STS-B/{split}.tsv", "index\tsentence1\tsentence2\tscore", scored)
        for name in [split] if split == "train" else ["dev_matched", "dev_mismatched"]:
            names = ("contradiction", "entailment", "neutral")
            shift = int(name == "dev_mismatched")
            lines = [f"{i}\t{text}\t{text}\t{names[(i + shift) % 3]}" for i, (text, _) in enumerate(rows)]
            write(f"MNLI/{name}.tsv", "index\tsentence1\tsentence2\tgold_label", lines)
    return root
