"""What carrying off-ramps costs a model that never exits: DeeBERT at threshold -1 against stock BERT, side by side.

python scripts/measure_overhead.py --model quickstart/saved_model --task_name SST-2 --data_dir quickstart/data/SST-2
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))

from deebert import errors
from deebert.arguments import positive
from deebert.checkpoints import load_config, load_model, load_tokenizer, quiet_transformers
from deebert.evaluation import timed_passes
from deebert.features import collator, load_features
from deebert.glue import eval_splits, get_task, label_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained DeeBERT (BERT)")
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--batch_size", type=positive, default=1)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--pad_to_max_length", action="store_true")
    parser.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args()
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, task = load_config(args.model, "bert"), get_task(args.task_name)
    ours = load_model(args.model, config).eval().to(device)
    stock = BertForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval().to(device)
    features = load_features(
        task,
        args.data_dir,
        next(iter(eval_splits(task))),
        label_order(task, "bert", config.id2label),
        load_tokenizer(args.model),
        args.max_seq_length,
    )
    collate = collator(config, args.max_seq_length if args.pad_to_max_length else None)

    def deebert(batch):
        return ours(**batch, early_exit_entropy=-1)

    forwards = (lambda batch: stock(**batch), deebert)
    *_, (theirs, mine) = timed_passes(forwards, features, collate, device, args.batch_size, args.repeats)
    ratios = mine.seconds / theirs.seconds - 1
    print(f"stock BERT {np.median(theirs.seconds):.2f} s, DeeBERT without exits {np.median(mine.seconds):.2f} s")
    print(
        f"overhead {100 * np.median(ratios):+.2f} %, {100 * ratios.min():+.2f} to {100 * ratios.max():+.2f} "
        f"in {args.repeats} repeats; {len(features)} samples, batch size {args.batch_size}, on {device}"
    )


if __name__ == "__main__":
    errors.run(main)
