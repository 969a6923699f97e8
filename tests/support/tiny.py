"""Tiny models, tokenizers, batches and sentences: everything offline, everything in seconds."""

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from deebert.modeling.backbones.bert import DeeBertConfig, DeeBertForSequenceClassification
from deebert.modeling.backbones.roberta import DeeRobertaConfig, DeeRobertaForSequenceClassification

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
    model = CLASSES[backbone][1](tiny_config(backbone, **overrides)).eval()
    for off_ramp in model.base_model.encoder.off_ramps:
        torch.nn.init.constant_(off_ramp.classifier.bias, 1e-7)  # not 0, as that of one that was never trained
    return model


def random_batch(config, lengths: list[int], seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of these lengths, padded to the longest and `padding` more."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + padding)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.vocab_size, shape, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, config.pad_token_id), "attention_mask": mask}


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
