"""The flags of run_glue_deebert.py that are about data: a GLUE task or own files, and the task that they make."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from deebert.data.label_values import PROBLEM_TYPES
from deebert.data.own_data import OwnFiles, own_task
from deebert.data.tasks import TASKS, Task, get_task
from deebert.evaluation import results
from deebert.experiment.flags import flag, number, switch
from deebert.modeling.config import DEFAULT_MAX_SEQ_LENGTH
from deebert.utils.cli import non_negative, up_to_half
from deebert.utils.errors import InputError

FILES = ("train_file", "validation_file", "test_file")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Data: the task and how its texts become batches."""

    task_name: str | None = flag(
        f"one of {', '.join(TASKS)}", decides="first_stage", default=None, default_help="none: own data"
    )
    data_dir: str | None = flag(  # compatibility.py compares the hashes of all data files
        "folder with the TSV files of --task_name", decides=None, default=None, default_help="none"
    )
    max_seq_length: int = number(
        int,
        "longer inputs are cut",
        decides="first_stage",
        default=DEFAULT_MAX_SEQ_LENGTH,
        default_help=f"{DEFAULT_MAX_SEQ_LENGTH}; of an evaluation: that of the training",
    )
    pad_to_max_length: bool = switch("pad every batch to max_seq_length, as the original does", decides="first_stage")
    overwrite_cache: bool = switch("tokenize again, even if the features are in the cache", decides=None)
    dataloader_num_workers: int = number(
        non_negative, "processes that make training batches; 0: the main process does it", decides=None, default=0
    )


def own_flag(help: str, **options) -> str | None:
    """A flag about --train_file, which decides nothing without it; where none is said, the default is None."""
    options = {"default": None, "default_help": "none"} | options
    return flag(help, decides="first_stage", only_with="train_file", needs=FILES, **options)


@dataclass(frozen=True, kw_only=True)
class OwnDataArguments:
    """Own data: CSV, TSV, JSONL or Parquet files in place of --task_name (docs/own_data.md).

    An evaluation takes what is not given here from the training of the model in output_dir.
    """

    train_file: str | None = flag("texts with labels to train on", decides=None, default=None, default_help="none")
    validation_file: str | None = flag(
        "texts with labels to choose a threshold on", decides=None, default=None, default_help="a part of --train_file"
    )
    test_file: str | None = flag(
        "texts with labels that are only scored", decides=None, default=None, default_help="none"
    )
    validation_split: float = own_flag(
        "share of --train_file that is held out where there is no --validation_file",
        type=up_to_half,
        default=0.1,
        default_help=None,
    )
    text_column: str | None = own_flag("the column of the text", default_help="guessed by its name")
    text_pair_column: str | None = own_flag(
        "the column of the second text of pairs", default_help="guessed by its name"
    )
    label_column: str | None = own_flag("the column of the label", default_help="guessed by its name")
    column_names: str | None = own_flag("names of the columns, with commas, of files without a header line")
    label_separator: str | None = own_flag("what stands between the labels of a line that may have several")
    label_names: str | None = own_flag("file with a name in each line, for labels that are numbers from 0")
    problem_type: str | None = own_flag(
        "what the labels are", choices=PROBLEM_TYPES, default_help="guessed by the labels; numbers are classes"
    )

    @property
    def own_data(self) -> bool:
        """Whether the data are own files."""
        return any(getattr(self, name) for name in FILES)


def find_task(args) -> Task:
    """The task of --task_name, or the one that own files make. args: all flags. Raises InputError."""
    if args.own_data and (args.task_name or args.data_dir):
        raise InputError("--task_name and --data_dir are for GLUE's files; leave them out with your own")
    if args.task_name and args.data_dir:
        return get_task(args.task_name)
    if not args.own_data:
        raise InputError("no data: give --train_file with your own, or --task_name and --data_dir")
    if args.do_train and not args.train_file:
        raise InputError("--do_train needs --train_file")
    if not (args.train_file or args.validation_file):
        raise InputError(f"--test_file {args.test_file}: give --validation_file, too")
    evaluated = {} if args.do_train else trained_labels(Path(args.output_dir))
    return own_task(
        OwnFiles(
            **{"problem_type": args.problem_type} | evaluated,
            train=as_path(args.train_file),
            validation=as_path(args.validation_file),
            test=as_path(args.test_file),
            text_column=args.text_column,
            text_pair_column=args.text_pair_column,
            label_column=args.label_column,
            column_names=tuple(name.strip() for name in args.column_names.split(",")) if args.column_names else (),
            label_names=as_path(args.label_names),
            label_separator=args.label_separator,
            validation_split=args.validation_split,
        )
    )


def as_path(name: str | None) -> Path | None:
    return Path(name) if name else None


def trained_defaults(args: argparse.Namespace) -> dict:
    """For an evaluation: the flags about data that the model in output_dir was trained with.

    Its own files are among them only where no other files are given.
    """
    record, config = Path(args.output_dir, "run.json"), Path(args.output_dir, "config.json")
    if args.do_train:
        return {}
    length = results.read_json(config).get("max_seq_length") if config.is_file() else None
    defaults = {"max_seq_length": length} if isinstance(length, int) else {}
    if not record.is_file():
        return defaults
    trained = results.read_json(record).get("arguments")
    if not isinstance(trained, dict):
        raise InputError(f"{record}: damaged (no arguments); remove it")
    if args.task_name:
        return defaults
    names = [field.name for field in fields(OwnDataArguments)]
    same_files = args.train_file in (None, trained.get("train_file"))
    if args.validation_file or args.test_file or not same_files:
        names = [name for name in names if name not in FILES]
        if args.validation_file and Path(trained.get("train_file") or "").is_file():
            names.append("train_file")  # so that texts which the model has seen are named
    return defaults | {name: trained[name] for name in names if trained.get(name) is not None}


def trained_labels(folder: Path) -> dict:
    """Labels and problem type of the model in a folder, as fields of OwnFiles. Raises InputError."""
    if not (folder / "config.json").is_file():
        raise InputError(f"--output_dir {folder}: no trained model there; train one with --do_train")
    config = results.read_json(folder / "config.json")
    try:
        names = config.get("id2label", {})
        labels = tuple(names[i] for i in sorted(names, key=int))
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{folder / 'config.json'}: id2label names no labels; correct it there") from None
    return {"labels": labels, "problem_type": config.get("problem_type")}
