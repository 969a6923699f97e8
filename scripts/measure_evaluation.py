"""What the evaluation claims, measured on a trained BERT and a dev set:

1. the overhead of carrying off-ramps: DeeBERT at threshold -1 against stock BERT, side by side;
2. one pass against the original's way, a pass for each layer and for each threshold, batch size 1: the same scores and
   exits, and the time of both.

    python scripts/measure_evaluation.py --model MODEL --task_name SST-2 --data_dir quickstart/data/SST-2
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))

from deebert.data.batching import Collator, collator, data_loader, eval_batches
from deebert.data.features import Features
from deebert.data.tasks import Task, get_task
from deebert.evaluation.all_exits import AllExits, dev_features, layer_scores, run_all_exits, sweep
from deebert.evaluation.metrics import scores
from deebert.evaluation.timing import timed_passes
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, quiet_transformers
from deebert.utils import cli
from deebert.utils.cli import positive

THRESHOLDS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def overhead(model, folder: str, features: Features, collate: Collator, repeats: int) -> None:
    stock = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval().to(model.device)
    forwards = (lambda batch: stock(**batch), lambda batch: model(**batch, exit_threshold=-1))
    *_, (theirs, ours) = timed_passes(forwards, features, collate, model.device, 1, repeats)
    ratios = 100 * (ours.seconds / theirs.seconds - 1)
    print(
        f"stock BERT {np.median(theirs.seconds):.2f} s, DeeBERT without exits {np.median(ours.seconds):.2f} s: "
        f"{np.median(ratios):+.2f} % ({ratios.min():+.2f} to {ratios.max():+.2f} in {repeats} repeats)"
    )


@torch.inference_mode()
def one_by_one(model, features: Features, collate: Collator, **options) -> tuple[np.ndarray, np.ndarray]:
    """Logits (S, C) and exit layers (S,) of a pass with batch size 1."""
    logits, layers = [], []
    for batch in data_loader(features, eval_batches(features.lengths, 1), collate):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "token_type_ids")}
        output = model(**inputs, **options)
        logits.append(output.logits.cpu().numpy())
        layers.append(output.exit_layer.item())
    return np.concatenate(logits), np.array(layers)


def slow_way(model, task: Task, features: Features, collate: Collator, exits: AllExits) -> int:
    """Passes made. Raises AssertionError where a score or an exit differs from what the one pass says."""
    for layer, expected in enumerate(layer_scores(task, exits)):
        logits, _ = one_by_one(model, features, collate, output_layer=layer)
        assert scores(task, logits, features.labels) == expected, layer
    for row in sweep(task, exits, THRESHOLDS):
        logits, layers = one_by_one(model, features, collate, exit_threshold=row.threshold)
        assert tuple(np.bincount(layers, minlength=exits.num_layers + 1)[1:].tolist()) == row.exits, row
        assert scores(task, logits, features.labels)[task.primary_metric] == row.score, row
    return exits.num_layers + len(THRESHOLDS)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained DeeBERT (BERT)")
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--max_seq_length", type=positive, default=128)
    parser.add_argument("--pad_to_max_length", action="store_true")
    parser.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args()
    quiet_transformers()
    config, task = load_config(args.model, "bert"), get_task(args.task_name)
    model = load_model(args.model, config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    features = dev_features(task, args.data_dir, config, load_tokenizer(args.model), args.max_seq_length)
    collate = collator(config, args.max_seq_length if args.pad_to_max_length else None)

    print(f"{task.name}, {len(features)} samples, batch size 1, on {model.device}")
    overhead(model, args.model, features, collate, args.repeats)
    started = time.perf_counter()
    exits = run_all_exits(model, features, collate, progress=False)
    one_pass = time.perf_counter() - started
    passes = slow_way(model, task, features, collate, exits)
    slow = time.perf_counter() - started - one_pass
    print(f"the same scores and exits in 1 pass ({one_pass:.1f} s) as in {passes} passes ({slow:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
