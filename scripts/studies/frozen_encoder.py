"""What a practitioner would run first: logistic regression on the mean of a frozen encoder's tokens. Beside early exit.

    python scripts/studies/frozen_encoder.py --model quickstart/model --train_file train.csv --test_file test.csv

Features are normalised, C is 10. Prints the scores of the test file as `deebert eval` computes them, and the seconds.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from transformers import AutoModel, AutoTokenizer

from deebert.data.own_data import OwnFiles, OwnTask, own_task
from deebert.evaluation.metrics import scores
from deebert.utils import cli

BATCH_SIZE = 32


@torch.inference_mode()
def mean_features(texts: list[str], model: str, max_length: int) -> np.ndarray:
    """(S, H), of length 1. Texts of similar length are encoded together."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    order, features = np.argsort([len(text) for text in texts]), np.empty((len(texts), encoder.config.hidden_size))
    for start in range(0, len(texts), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        mask = batch["attention_mask"].unsqueeze(2)
        mean = (encoder(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        features[rows] = torch.nn.functional.normalize(mean).numpy()
    return features


def part(task: OwnTask, split: str, model: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (S, H) and labels (S,) or (S, C) of a split."""
    examples = task.read(None, split)
    return mean_features([each.texts[0] for each in examples], model, max_length), np.array([x.label for x in examples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a sentence encoder, a folder or a name on the hub")
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--test_file", type=Path, required=True)
    parser.add_argument("--max_seq_length", type=int, default=128)
    args = parser.parse_args()
    task, started = own_task(OwnFiles(train=args.train_file, validation=args.test_file)), time.perf_counter()
    train, labels = part(task, "train", args.model, args.max_seq_length)
    classifier = LogisticRegression(C=10, max_iter=1000)
    classifier = (OneVsRestClassifier(classifier) if task.several_labels else classifier).fit(train, labels)
    test, labels = part(task, "dev", args.model, args.max_seq_length)
    logits = classifier.decision_function(test)
    if logits.ndim == 1:  # of two labels
        logits = np.stack([-logits, logits], axis=1)
    shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores(task, logits, labels).items())
    print(f"{shown}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.run(main)
