"""Checks before the work: each raises InputError for one kind of wrong input, and none changes anything."""

from dataclasses import fields
from pathlib import Path

from deebert.data.encoding import MIN_TOKENS
from deebert.data.tasks import Task, check_num_labels, eval_splits
from deebert.evaluation import results
from deebert.experiment.arguments import OFF_RAMP_FLAGS, Arguments
from deebert.experiment.compatibility import first_difference, first_stage_settings, training_settings
from deebert.experiment.flags import default_of
from deebert.experiment.record import read_record
from deebert.modeling.checkpoints import check_threshold, max_tokens
from deebert.modeling.config import config_rule
from deebert.modeling.off_ramps import NEEDS_ALL_TOKENS, is_off_ramp
from deebert.training.checkpointing import saved_steps
from deebert.training.strategies import STRATEGIES, shares_first_stage
from deebert.utils.errors import InputError
from deebert.utils.files import check_disk_space, check_writable, size_of


def dev_splits(args: Arguments, task: Task) -> list[str]:
    """The dev files that this run scores; a test file only at the end."""
    needed = args.do_eval or args.eval_after_first_stage or args.evaluate_during_training
    return [split for split in eval_splits(task) if args.do_eval or split != "test"] if needed else []


def first_stage_record(args: Arguments) -> Path | None:
    """The settings file of the model in --first_stage, which exists once that model is complete."""
    return Path(args.first_stage, "first_stage.json") if args.first_stage else None


def has_first_stage(args: Arguments) -> bool:
    """Whether there is a model after stage 1 to start from."""
    record = first_stage_record(args)
    return record is not None and record.is_file()


def check_flags(args: Arguments, task: Task) -> None:
    """The flags against one another, and that the data files exist."""
    folder, _ = Path(args.output_dir), args.target  # raises for targets that exclude one another
    if not (args.do_train or args.do_eval):
        raise InputError("nothing to do: give --do_train or --do_eval")
    if folder.name in ("", ".."):
        raise InputError(f"--output_dir {folder}: give a folder's name, results are named after it")
    results.result_dir(args.plot_data_dir, args.model_name_or_path)  # raises for a name without a folder's name
    for split in [*dev_splits(args, task), *(["train"] if args.do_train else [])]:
        task.file(args.data_dir, split)
    check_needs(args)
    if args.highway_epochs and len(STRATEGIES[args.train_strategy]) == 1:
        raise InputError(f"--highway_epochs: --train_strategy {args.train_strategy} has no second stage; leave it out")
    if args.evaluate_during_training and not args.logging_steps:
        raise InputError("--evaluate_during_training: it scores every --logging_steps, and that is 0")
    if args.first_stage and not (args.do_train and shares_first_stage(args.train_strategy)):
        shared = " or ".join(filter(shares_first_stage, STRATEGIES))
        raise InputError(f"--first_stage {args.first_stage}: it needs --do_train with the strategy {shared}")
    if args.first_stage and Path(args.first_stage).resolve() == folder.resolve():
        raise InputError(f"--first_stage {args.first_stage}: give another folder than --output_dir")
    if args.load_best_model_at_end and not (args.evaluate_during_training and args.logging_steps > 0):
        raise InputError("--load_best_model_at_end needs scores: add --evaluate_during_training (--logging_steps)")
    if args.cache_features and args.train_strategy != "two_stage":
        raise InputError(f"--cache_features: in --train_strategy {args.train_strategy} no stage freezes the backbone")
    if args.resume and not args.do_train:
        raise InputError("--resume needs --do_train")
    check_teacher(args)


def check_needs(args: Arguments) -> None:
    """A flag that can have no effect beside the others is a mistake."""
    given = {field.name for field in fields(args) if getattr(args, field.name) != default_of(field)}
    for field in fields(args):
        needs = field.metadata["needs"]
        if needs and field.name in given and not given & {*needs}:
            wanted = " or ".join(f"--{name}" for name in needs)
            raise InputError(f"--{field.name} has no effect without {wanted}: add it, or leave --{field.name} out")


def check_teacher(args: Arguments) -> None:
    """The teacher against the other flags, and that there is one."""
    stages = len(STRATEGIES[args.train_strategy])
    if args.teacher is None:
        return
    if not (args.do_train and args.distill):
        raise InputError(f"--teacher {args.teacher}: it needs --do_train and --distill")
    if args.teacher == "first_stage" and stages == 1:
        raise InputError(f"--teacher first_stage: {args.train_strategy} has one stage; give a folder")


def check_teacher_config(args: Arguments, config, teacher) -> None:
    """The teacher's config must fit the model's that learns: the same texts, tokens and labels."""
    wanted, other = (sorted(c.id2label.items()) for c in (config, teacher))
    if wanted != other or config.num_labels != teacher.num_labels:
        raise InputError(
            f"--teacher {args.teacher}: its labels are {', '.join(label for _, label in other)}, those to learn are "
            f"{', '.join(label for _, label in wanted)}"
        )
    if teacher.vocab_size != config.vocab_size or max_tokens(teacher) < args.max_seq_length:
        raise InputError(
            f"--teacher {args.teacher}: a vocabulary of {teacher.vocab_size} and texts of up to {max_tokens(teacher)} "
            f"tokens; the model has a vocabulary of {config.vocab_size}, and --max_seq_length is {args.max_seq_length}"
        )


def check_output_dir(args: Arguments, resumes: bool) -> None:
    """An evaluation needs a model in output_dir; a training must not overwrite results by accident."""
    folder = Path(args.output_dir)
    if not args.do_train:
        if not (folder / "config.json").is_file():
            raise InputError(f"--output_dir {folder}: no trained model there; train one with --do_train")
        return
    if args.overwrite_output_dir or resumes or not folder.is_dir() or not any(folder.iterdir()):
        return
    record = read_record(folder)
    if args.resume and record:
        other = first_difference(record["settings"], training_settings(args))
        raise InputError(
            f"--resume: the training in {folder} had another {other}; --overwrite_output_dir starts a new one"
        )
    if record and not record["finished"]:
        raise InputError(
            f"--output_dir {folder}: a training that is not finished; --resume goes on with it, "
            "--overwrite_output_dir starts again"
        )
    raise InputError(f"--output_dir {folder}: the folder is not empty; choose another or add --overwrite_output_dir")


def check_tokenizer(args: Arguments, recorded: str, tokenizer: str) -> None:
    """A training that is resumed must go on with its tokenizer. Both are fingerprints; recorded: "" before 0.8."""
    if recorded not in ("", tokenizer):
        raise InputError(
            f"--resume: the tokenizer in {args.tokenizer_name or args.model_name_or_path} is another one than the "
            f"training in {args.output_dir} had; put it back, or --overwrite_output_dir starts a new one"
        )


def check_split(args: Arguments) -> None:
    """A dev set that is a part of --train_file must be the part that the model was not trained on."""
    record = None if args.do_train else read_record(Path(args.output_dir))
    if not args.own_data or args.validation_file or record is None or not record["arguments"].get("train_file"):
        return
    names = ("train.tsv", "validation_split")
    settings = {name: training_settings(args)[name] for name in names}
    if record["arguments"].get("validation_file") or first_difference(record["settings"], settings):
        raise InputError(
            f"--train_file {args.train_file}: the model in {args.output_dir} was trained with other files, or "
            "another --validation_split, so that a part of this one may hold texts that it has seen; give "
            "--validation_file"
        )


def check_first_stage(args: Arguments, resumes: bool) -> None:
    """A model in --first_stage must have been trained with this run's settings."""
    if has_first_stage(args):
        recorded = results.read_json(first_stage_record(args))
        if other := first_difference(recorded, first_stage_settings(args)):
            raise InputError(f"--first_stage {args.first_stage}: trained with another {other}")
    elif args.first_stage and Path(args.first_stage).exists() and not resumes:
        raise InputError(f"--first_stage {args.first_stage}: no model after stage 1 there; give a new folder")


def check_head(args: Arguments, config, name: str) -> None:
    """A training must not start from off-ramps of another head: their classifiers were trained on another input."""
    has_off_ramps = any(architecture.startswith("Dee") for architecture in config.architectures or ())
    if has_off_ramps and args.highway_head not in (None, config.highway_head):
        raise InputError(
            f"--highway_head {args.highway_head}: the off-ramps of {name} have {config.highway_head}; leave it out, "
            f"choose --recipe paper (this run has --recipe {args.recipe}), or start from a model without off-ramps"
        )


def check_config(args: Arguments, task: Task, config, name: str) -> None:
    """A model, to be trained or evaluated, must fit the flags and the task. name: of the model, for messages."""
    limit = max_tokens(config)
    if not MIN_TOKENS <= args.max_seq_length <= limit:
        raise InputError(f"--max_seq_length {args.max_seq_length}: this model takes {MIN_TOKENS} to {limit} tokens")
    if config.num_hidden_layers < 2:
        raise InputError(f"{name}: a model of one layer has no off-ramps")
    check_num_labels(task, config.num_labels, name)
    if config.exit_before_first_layer and config.highway_pooling == "first":
        raise InputError(f"--{NEEDS_ALL_TOKENS}")
    for flag in OFF_RAMP_FLAGS:
        wanted, trained = getattr(args, flag), getattr(config, flag)
        if wanted not in (None, trained):
            raise InputError(f"--{flag} {wanted}: {name} has {trained}; leave it out")
    if args.target and not config_rule(config).supported:
        raise InputError(
            f"{task.name}: no threshold can be chosen for the exit rule {config.exit_rule}: with one label its "
            "uncertainty is always 0; use --exit_rule patience"
        )
    for threshold in args.exit_threshold:
        check_threshold(threshold, config)


def check_outputs_writable(args: Arguments) -> None:
    """Results that are written after hours of work need folders that can be written to."""
    check_writable(Path(args.output_dir), "--output_dir")
    if args.do_eval and (args.eval_each_highway or args.eval_highway or args.target):
        check_writable(Path(args.plot_data_dir), "--plot_data_dir")


def check_space_for_checkpoints(args: Arguments, model, samples: int, processes: int, first_stage: int) -> None:
    """The checkpoints of the stages from first_stage on must fit on the disk. samples: of the training set.

    Those that are there already are removed, or belong to the training that is resumed and are counted with it.
    """
    weights = 4 * model.num_parameters()
    off_ramps = 4 * sum(p.numel() for name, p in model.named_parameters() if is_off_ramp(name))
    samples_per_step = args.per_gpu_train_batch_size * args.gradient_accumulation_steps * processes
    sizes = []  # bytes of each checkpoint
    for stage, plan in list(enumerate(STRATEGIES[args.train_strategy], 1))[first_stage - 1 :]:
        steps = args.stage_settings(stage).total_steps(-(-samples // samples_per_step))
        trained = plan.backbone * (weights - off_ramps) + plan.highways * off_ramps
        count = -(-steps // args.save_steps) if args.save_steps > 0 else 1
        sizes += [weights + 2 * trained] * count  # AdamW stores two numbers for each trained weight
    if args.save_total_limit:  # a new one is written before the oldest is removed
        sizes = sorted(sizes)[-args.save_total_limit - 1 :]
    size = sum(sizes) + weights * (1 + 2 * args.load_best_model_at_end)
    folder = Path(args.output_dir)
    there = size_of([*saved_steps(folder), *folder.glob("best-stage*")])
    check_disk_space(folder, size, "checkpoints (--save_steps, --save_total_limit)", reusable=there)
