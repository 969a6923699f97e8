"""`deebert add-exits --model DIR --file texts.txt --output FAST`: early exit for a classifier that you have.

The new model gives the classifier's predictions at a part of its cost. The texts need no labels.
"""

from deebert.utils.cli import ArgumentParser, fraction, non_negative, positive


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[1])
    flag = parser.add_argument
    flag("--model", required=True, help="the fine-tuned classifier, a folder or a name on the hub; it is only read")
    flag(
        "--file", required=True, dest="texts", help="texts, UTF-8, one in each line; or a .csv, .tsv, .jsonl, .parquet"
    )
    flag("--output", required=True, help="folder of the new model")
    share = "share of unseen texts that keep the classifier's label, with 95 %% confidence"
    flag("--agreement", type=fraction, default=0.98, help=share)
    flag("--text_column", help="of a table; of pairs both with a comma (default: guessed by the names)")
    flag("--label_column", help="of a table; labels are only scored (default: guessed by its name)")
    flag("--label_separator", help="what stands between the labels of a line that may have several")
    flag("--max_seq_length", type=positive, help="longer texts are cut (default: the tokenizer's limit)")
    flag("--seed", type=non_negative, default=42, help="of the held-out texts, the new weights and the batches")
    args = parser.parse_args()
    from deebert.experiment.add_exits import add_exits  # seconds of imports, after the flags have been checked
    from deebert.modeling.checkpoints import quiet_transformers

    quiet_transformers()
    add_exits(**vars(args))
