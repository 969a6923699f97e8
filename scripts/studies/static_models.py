"""A static model: the first layers of a checkpoint with one classifier, fine-tuned by transformers.Trainer.

Early exit has to beat such models. What is saved is an ordinary Hugging Face folder: with --pooling first of the class
that AutoModelForSequenceClassification chooses, with --pooling mean of the class below. In it is all_exits.npz, the dev
set's logits and operations, as an evaluation of a model with exits writes them.

    python scripts/studies/static_models.py --layers 3 --pooling mean --do_train --output_dir static3 \\
        --model_name_or_path quickstart/model --task_name SST-2 --data_dir quickstart/data/SST-2 --num_train_epochs 4

Further flags are those of run_glue_deebert.py. Takes a training's time, in proportion to the layers. compare.sh trains
all static models of a settings file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert import Classifier
from deebert.data.tasks import Example, Task, label_order
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.cost import head_operations, layer_operations
from deebert.experiment.arguments import Arguments, parse_args
from deebert.experiment.earlier_run import precision
from deebert.experiment.experiment import config_to_train, find_task
from deebert.modeling.checkpoints import quiet_transformers, set_labels
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.stage import parameter_groups
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError

ALL_EXITS = "all_exits.npz"
FLAGS = ArgumentParser(add_help=False, allow_abbrev=False)
FLAGS.add_argument("--layers", type=positive, help="how many layers of the checkpoint")
FLAGS.add_argument("--pooling", choices=("first", "mean"), default="mean", help="what the classifier reads")
FLAGS.add_argument("--teacher", help="distil: half of the loss is the distance from this trained model's predictions")


class MeanPooledForSequenceClassification(PreTrainedModel):
    """Any encoder of AutoModel with a linear classifier of the mean over the tokens."""

    base_model_prefix = "encoder"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.encoder.pooler = None
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @property
    def _supports_sdpa(self) -> bool:
        return MODEL_MAPPING[type(self.config)]._supports_sdpa  # MPNet's encoder has its own attention alone

    def forward(self, input_ids, attention_mask, labels=None, **inputs) -> SequenceClassifierOutput:
        hidden_states = self.encoder(input_ids, attention_mask=attention_mask, **inputs).last_hidden_state  # (B, T, H)
        tokens = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        logits = self.classifier(self.dropout((hidden_states * tokens).sum(dim=1) / tokens.sum(dim=1)))  # (B, C)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def model_class(pooling: str) -> type:
    return MeanPooledForSequenceClassification if pooling == "mean" else AutoModelForSequenceClassification


def load(folder: str | Path) -> PreTrainedModel:
    """A static model that `train` saved, or any other of Hugging Face's classifiers."""
    config = AutoConfig.from_pretrained(folder)
    pooled = MeanPooledForSequenceClassification.__name__ in (config.architectures or ())
    return model_class("mean" if pooled else "first").from_pretrained(folder, config=config).eval()


def pooling_of(model) -> str:
    return "mean" if isinstance(model, MeanPooledForSequenceClassification) else "first"


def operations(config, layers: int, pooling: str, lengths: np.ndarray) -> np.ndarray:
    """(S,) of the first layers of a model of this config, on texts of these lengths (S,).

    As in a model with exits, the last layer counts for the first token only, if nothing else is read.
    """
    can_shorten = config.first_token_only or config.linear_classifier  # whatever our model's own classifier reads
    read = 1 if pooling == "first" and can_shorten else lengths
    last = layer_operations(config, lengths, read) + head_operations(config, has_pooler=pooling == "first")
    return (layers - 1) * layer_operations(config, lengths, lengths) + last


def encode(examples: list[Example], tokenizer, max_length: int) -> list[dict]:
    """The tokens and the label of each text."""
    columns = map(list, zip(*(each.texts for each in examples), strict=True))
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [
        {"labels": each.label} | {name: values[i] for name, values in encoded.items()}
        for i, each in enumerate(examples)
    ]


def soft_labels(teacher: str, examples: list[Example], labels: tuple[str, ...]) -> list[list[float]]:
    """(S, C) probabilities: half of each text's label and half of the full model's in the folder `teacher`."""
    predicted = Classifier(teacher)([each.texts for each in examples], exit_threshold=NO_EXIT)
    likely = np.array([[each.probabilities[label] for label in labels] for each in predicted])
    return (0.5 * np.eye(len(labels))[[each.label for each in examples]] + 0.5 * likely).tolist()


def cross_entropy(output: SequenceClassifierOutput, labels: torch.Tensor, **_) -> torch.Tensor:
    """Of labels (B,), or of probabilities (B, C)."""
    return nn.functional.cross_entropy(output.logits, labels)


def make_trainer(
    args: Arguments, task: Task, layers: int, pooling: str, teacher: str | None = None, **arguments
) -> Trainer:
    """A trainer with the driver's settings; it writes the model to output_dir. arguments: of TrainingArguments."""
    source, ours = args.model.model_name_or_path, config_to_train(args, task)
    config, settings = AutoConfig.from_pretrained(source), args.stage_settings(1, ours.hidden_size)
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"--layers {layers}: {source} has {config.num_hidden_layers}")
    labels = label_order(task, ours.model_type, ours.id2label)
    set_labels(config, labels, task.problem_type)
    config.num_hidden_layers = layers
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train_texts, dev_texts = (
        task.read(args.data.data_dir, split, labels) for split in ("train", next(iter(task.dev_splits)))
    )
    train_set, dev_set = (encode(texts, tokenizer, ours.max_seq_length) for texts in (train_texts, dev_texts))
    if teacher is not None:
        for each, soft in zip(train_set, soft_labels(teacher, train_texts, labels), strict=True):
            each["labels"] = soft
    model = model_class(pooling).from_pretrained(source, config=config, ignore_mismatched_sizes=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), eps=settings.adam_epsilon)
    return Trainer(
        model=model,
        compute_loss_func=None if teacher is None else cross_entropy,
        optimizers=(optimizer, None),  # with the rates of the driver: that of the head, too
        args=TrainingArguments(
            args.run.output_dir,
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.per_gpu_train_batch_size,
            per_device_eval_batch_size=32,
            max_grad_norm=settings.max_grad_norm,
            warmup_steps=settings.warmup_steps,
            seed=settings.seed,
            train_sampling_strategy="group_by_length",
            use_cpu=args.run.no_cuda or not torch.cuda.is_available(),
            bf16=precision(args) == "bf16",
            save_strategy="no",
            report_to="none",
            **arguments,
        ),
        train_dataset=train_set,
        eval_dataset=dev_set,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def train(args: Arguments, layers: int, pooling: str, teacher: str | None = None) -> AllExits:
    """Trains a static model, saves it in output_dir, and returns its dev logits."""
    task = find_task(args.data, args.own)
    trainer = make_trainer(args, task, layers, pooling, teacher)
    trainer.train()
    trainer.save_model()
    trainer.args.train_sampling_strategy = "random"  # else predict groups by length, too, and returns another order
    dev_set = trainer.eval_dataset
    lengths = np.array([len(each["input_ids"]) for each in dev_set], float)
    exits = AllExits(
        logits=trainer.predict(dev_set).predictions[:, None].astype(np.float32),
        labels=np.array([each["labels"] for each in dev_set]),
        layer_operations=operations(config_to_train(args, task), layers, pooling, lengths)[:, None],
        off_ramp_operations=np.zeros((len(dev_set), 0)),
        several_labels=task.several_labels,
    )
    exits.save(Path(args.run.output_dir) / ALL_EXITS)
    return exits


def main() -> None:
    if "--help" in sys.argv:
        print(f"{__doc__}\n{FLAGS.format_help()}")
        return
    static, flags = FLAGS.parse_known_args()
    if static.layers is None:
        raise InputError("--layers is required: how many layers of the checkpoint")
    args = parse_args(flags)
    quiet_transformers()
    exits = train(args, static.layers, static.pooling, static.teacher)
    score = exits.full_score(find_task(args.data, args.own))
    print(f"{args.run.output_dir}: {static.layers} layers, dev score {100 * score:.1f}")


if __name__ == "__main__":
    cli.run(main)
