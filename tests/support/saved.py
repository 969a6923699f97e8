"""A saved model with its tokenizer, for tests of what classifies texts."""

from pathlib import Path

import torch
from support.tiny import sentences, tiny_model, tiny_tokenizer

from deebert.modeling.checkpoints import save_model
from deebert.modeling.exit_rules import entropy

TEXTS = [text for text, _ in sentences(9, seed=5)]


def save_classifier(folder: Path) -> str:
    """Writes a tiny model. Half of TEXTS exit at each off-ramp; the dev set did at the first and the last."""
    model, tokenizer = tiny_model("bert", highway_pooling="mean"), tiny_tokenizer("bert")
    with torch.no_grad():
        all_logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True), output_all_exits=True).all_logits
    threshold = (entropy(all_logits[:, :-1]).median(dim=0).values + 1e-4).tolist()
    model.set_exit_threshold(threshold)
    save_model(model, tokenizer, folder)
    return str(folder)
