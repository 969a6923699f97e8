"""What the steps of a run share: the flags, the task, the model's config, tokenizer, data and devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from deebert.data.batching import Collator, Features, collator, fingerprint, tokenize
from deebert.data.encoding import MIN_TOKENS, check_vocabulary
from deebert.data.own_data import OwnFiles, own_task
from deebert.data.tasks import Task, check_num_labels, get_task, label_order
from deebert.evaluation.all_exits import AllExits, run_all_exits
from deebert.evaluation.metrics import with_metric
from deebert.evaluation.results import result_dir
from deebert.experiment import earlier_run
from deebert.experiment.arguments import VALIDATION_SPLIT, Arguments, DataArguments, ModelArguments, OwnDataArguments
from deebert.experiment.earlier_run import RunRecord
from deebert.modeling import checkpoints
from deebert.modeling.config import DEFAULT_MAX_SEQ_LENGTH, config_rule
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.checkpointing import saved_steps
from deebert.training.strategies import RECIPES, STRATEGIES
from deebert.training.train_data import TokenData, TrainData, cached_features
from deebert.utils.errors import InputError


@dataclass(frozen=True)
class Experiment:
    """One run of the driver: its flags and devices, and what follows from them, loaded when it is first used.

    Nothing of this writes. All of it raises InputError where the input is wrong.
    """

    args: Arguments
    accelerator: Accelerator

    @classmethod
    def from_args(cls, args: Arguments, accelerator: Accelerator) -> "Experiment":
        """The experiment with all input checked and loaded, in an order that names cheap mistakes first."""
        self = cls(args, accelerator)
        checkpoints.quiet_transformers()
        set_seed(args.training.seed)
        previous = self.previous_record
        check_config(args, self.task, self.config, self.source)
        self.scored_task  # noqa: B018  checked
        for note in self.task.notes:
            self.say(note)
        if previous is not None and previous["tokenizer"] != fingerprint(self.tokenizer):
            fix = "put it back, or --overwrite_output_dir starts a new one"
            raise InputError(f"--resume: the tokenizer in {self.source} is another one than before; {fix}")
        check_vocabulary(self.tokenizer.backend_tokenizer, self.config.vocab_size, self.source)
        self.dev_sets, self.train_features  # noqa: B018  they are kept
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.args.run.output_dir)

    @property
    def source(self) -> str:
        """The model to start from, or the one to evaluate."""
        return self.args.model.model_name_or_path if self.args.run.do_train else self.args.run.output_dir

    def result_folder(self, checkpoint: Path, suffix: str) -> Path:
        """Of a model's results on the dev set with this suffix."""
        if not self.args.run.plot_data_dir:
            return checkpoint / f"results{suffix}"
        # results of a model that this run trained, or of a checkpoint, have its own name, not that of its start
        own_name = self.args.run.do_train or checkpoint != self.output_dir
        name = str(checkpoint) if own_name else self.args.model.model_name_or_path
        return result_dir(self.args.run.plot_data_dir, name, suffix)

    @cached_property
    def task(self) -> Task:
        if self.args.run.do_train:
            return find_task(self.args.data, self.args.own)
        return task_of_training(self.args, self.config)

    @cached_property
    def scored_task(self) -> Task:
        """The task with the metric of --metric, or of the training, in place of its own."""
        record = None if self.args.run.do_train else earlier_run.read_record(self.output_dir)
        metric = self.args.evaluation.metric or (record or {"arguments": {}})["arguments"].get("metric")
        labels = label_order(self.task, self.config.model_type, self.config.id2label)
        return with_metric(self.task, metric, labels) if metric else self.task

    @cached_property
    def config(self):
        """Of the model to be trained, or of the one in output_dir."""
        return config_to_train(self.args, self.task) if self.args.run.do_train else trained_config(self.args)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        args, limit = self.args.model, checkpoints.max_tokens(self.config)
        tokenizer = checkpoints.load_tokenizer(args.tokenizer_name or self.source, args.do_lower_case, args.cache_dir)
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # saved with the model
        return tokenizer

    @cached_property
    def settings(self) -> dict:
        """All that decides the model that this run trains."""
        return earlier_run.training_settings(self.args, self.task)

    @cached_property
    def previous_record(self) -> dict | None:
        """run.json of the training that this run resumes, None if it resumes none."""
        return earlier_run.training_to_resume(self.args.run, self.settings) if self.args.run.do_train else None

    @cached_property
    def record(self) -> RunRecord:
        settings = self.settings if self.args.run.do_train else {}
        return RunRecord(self.args, self.accelerator, fingerprint(self.tokenizer), settings)

    @cached_property
    def collate(self) -> Collator:
        return collator(self.config)

    @cached_property
    def train_features(self) -> Features | None:
        """The training set, None without --do_train."""
        return self.features("train") if self.args.run.do_train else None

    @cached_property
    def dev_sets(self) -> dict[str, Features]:
        """The dev files that this run scores, by split; a test file only at the end."""
        wanted = self.args.checkpoints
        watched = self.args.evaluation.eval_after_first_stage or wanted.evaluate_during_training
        watched |= self.args.run.do_train and wanted.load_best_model_at_end
        scored = {split: self.args.run.do_eval or (watched and split != "test") for split in self.task.dev_splits}
        return {split: self.features(split) for split, needed in scored.items() if needed}

    def all_exits(self, model, test: bool = True, progress: bool = True) -> Iterator[tuple[str, AllExits]]:
        """For each dev set the logits of all exits, see `run_all_exits`. test: also for a test file."""
        for split, features in self.dev_sets.items():
            if test or split != "test":
                exits = run_all_exits(model, features, self.collate, progress=progress, accelerator=self.accelerator)
                yield split, exits

    def features(self, split: str) -> Features:
        """A split, tokenized."""
        labels = label_order(self.task, self.config.model_type, self.config.id2label)
        examples = self.task.read(self.args.data.data_dir, split, labels)
        loaded = tokenize(examples, self.tokenizer, self.config.max_seq_length)
        if note := loaded.cut_note():
            self.say(f"note: {split}: {note} (max_seq_length)")
        return loaded

    @property
    def finished(self) -> bool:
        """Whether the training that this run resumes has nothing left to do."""
        complete = all((self.output_dir / name).is_file() for name in ("config.json", "model.safetensors"))
        return self.previous_record is not None and self.previous_record["finished"] and complete

    def models_to_evaluate(self) -> list[Path]:
        """The model in output_dir; before it, with --eval_all_checkpoints, the checkpoints of its training."""
        earlier = saved_steps(self.output_dir) if self.args.evaluation.eval_all_checkpoints else []
        return [*earlier, self.output_dir]

    def load_trained(self, folder: Path):
        """A trained model, on the device. Raises InputError if it does not fit the flags."""
        config = config_with_rule(self.args.model, str(folder))
        check_config(self.args, self.task, config, str(folder))
        return checkpoints.load_model(str(folder), config).to(self.accelerator.device)

    @contextmanager
    def train_data(self, model, stage: int) -> Iterator[TrainData]:
        """The data of a stage: tokens; of a frozen backbone, where the recipe caches, the off-ramps' pooled states."""
        collate, plan = self.collate, STRATEGIES[self.args.training.train_strategy][stage - 1]
        if plan.trains == "off_ramps" and RECIPES[self.args.model.recipe].cache_features:
            with cached_features(model, self.train_features, collate, self.accelerator, self.output_dir) as features:
                yield features
        else:
            yield TokenData(self.train_features, collate)

    def say(self, text: str) -> None:
        """Prints in the first process only."""
        self.accelerator.print(text, flush=True)


def find_task(data: DataArguments, own: OwnDataArguments, **trained) -> Task:
    """The task of --task_name, or the one that own files make. trained: fields of OwnFiles. Raises InputError."""
    if data.task_name and data.data_dir:
        return get_task(data.task_name)
    if not own.files:
        raise InputError("no data: give --train_file with your own, or --task_name and --data_dir")
    if not (own.train_file or own.validation_file):
        raise InputError(f"--test_file {own.test_file}: give --validation_file, or --train_file of the training, too")
    return own_task(
        OwnFiles(
            **{"problem_type": own.problem_type} | trained,
            **{name.removesuffix("_file"): Path(file) for name, file in own.files.items()},
            text_column=own.text_column,
            label_column=own.label_column,
            column_names=tuple(name.strip() for name in own.column_names.split(",")) if own.column_names else (),
            label_names=Path(own.label_names) if own.label_names else None,
            label_separator=own.label_separator,
            validation_split=own.validation_split or VALIDATION_SPLIT,
        )
    )


def trained_config(args: Arguments):
    """The config of the model that will be evaluated. Raises InputError."""
    folder = Path(args.run.output_dir)
    if not (folder / "config.json").is_file():
        raise InputError(f"--output_dir {folder}: no trained model there; train one with --do_train")
    config = config_with_rule(args.model, str(folder))
    set_text_length(config, args.data.max_seq_length or config.max_seq_length)
    return config


def task_of_training(args: Arguments, config) -> Task:
    """For an evaluation: the task of the trained model, with the files that are given or those of the training."""
    folder = Path(args.run.output_dir)
    record = earlier_run.read_record(folder)
    own = args.own if args.data.task_name else earlier_run.data_of_training(args.own, record)
    labels = tuple(config.id2label[i] for i in sorted(config.id2label))
    task = find_task(args.data, own, labels=labels, problem_type=config.problem_type)
    earlier_run.check_held_out_part(own, task, folder, record)
    return task


def config_to_train(args: Arguments, task: Task):
    """The config of the model that will be trained. Raises InputError."""
    source, wanted = args.model.config_name or args.model.model_name_or_path, args.model.off_ramps()
    config = config_with_rule(args.model, source)
    if has_off_ramps(config) and wanted.get("highway_head", config.highway_head) != config.highway_head:
        raise InputError(
            f"--recipe {args.model.recipe}: the classifiers of {source}'s off-ramps are of another kind, "
            f"{config.highway_head}; give --recipe paper to keep them, or start from a model without off-ramps"
        )
    checkpoints.set_labels(config, label_order(task, config.model_type, config.id2label), task.problem_type)
    config.exit_threshold, config.min_confidence = NO_EXIT, 0.0  # what was chosen before this training has no meaning
    set_text_length(config, args.data.max_seq_length)
    for name, value in wanted.items():
        setattr(config, name, value)
    return config


def has_off_ramps(config) -> bool:
    """Whether the checkpoint of this config was saved with off-ramps."""
    return any(architecture.startswith("Dee") for architecture in config.architectures or ())


def check_depth(config, name: str) -> None:
    if config.num_hidden_layers < 2:
        raise InputError(f"{name}: a model of one layer has no off-ramps")


def set_text_length(config, length: int | None) -> None:
    """Sets the number of tokens that texts are cut to. None: the default, or what the model has positions for."""
    limit = checkpoints.max_tokens(config)
    if length is not None and not MIN_TOKENS <= length <= limit:
        raise InputError(f"max_seq_length {length}: this model takes {MIN_TOKENS} to {limit} tokens")
    config.max_seq_length = min(DEFAULT_MAX_SEQ_LENGTH, limit) if length is None else length


def check_config(args: Arguments, task: Task, config, name: str) -> None:
    """A model, to be trained or evaluated, must fit the flags and the task. name: of the model, for messages."""
    check_depth(config, name)
    check_num_labels(task, config.num_labels, name)
    if args.model.highway_pooling not in (None, config.highway_pooling):
        raise InputError(
            f"--highway_pooling {args.model.highway_pooling}: {name} has {config.highway_pooling}; leave it out"
        )
    if args.evaluation.answered_accuracy is not None and not task.labels:
        raise InputError(f"--answered_accuracy: {task.name} has numbers to predict, and their accuracy is not defined")
    if args.evaluation.chooses_threshold and not config_rule(config).supported:
        raise InputError(
            f"{task.name}: no threshold can be chosen for the exit rule {config.exit_rule}: with one label its "
            "uncertainty is always 0; use --exit_rule patience"
        )
    for threshold in args.evaluation.exit_threshold:
        checkpoints.check_threshold(threshold, config)


def config_with_rule(model: ModelArguments, name_or_path: str):
    """A checkpoint's config with the exit rule of the flags. A threshold for another rule is removed."""
    config = checkpoints.load_config(name_or_path, model.model_type, model.cache_dir)
    if model.exit_rule not in (None, config.exit_rule):
        config.exit_rule, config.exit_threshold, config.min_confidence = model.exit_rule, NO_EXIT, 0.0
    return config
