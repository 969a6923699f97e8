"""README.md of a trained model: what it is, how to load it, and as metadata of the hub what its exits score.

The text is written once, so that it is the user's from then on. Evaluations change the scores in the metadata alone.
"""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from deebert.data.label_values import listing
from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, layer_scores, sweep
from deebert.evaluation.threshold_selection import answered
from deebert.utils.files import replacing

CARD = "README.md"
MOST_LABELS = 100

TEXT = """
# {name}

A model of {config.num_hidden_layers} layers ({config.model_type}) with early exit
(DeeBERT, Xin et al., ACL 2020){origin}.

- Task: {task.name}
- Labels: {labels}
- Exit rule: {config.exit_rule}. The threshold is `exit_threshold` in `config.json`; at 0 or below no
  sample exits early.

## How to load it

In Python, with the package `deebert` installed, and FOLDER this folder or its name on the hub:

```python
from deebert import {config.architectures[0]}

model = {config.architectures[0]}.from_pretrained("FOLDER").eval()
```

```python
import deebert
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER")
```

On the command line: `deebert predict --model FOLDER < texts.txt`. Tools that know the plain encoder only
{others}.

## Licence

None is chosen here. Add a line `license: ...` at the top. Mind the licences of base model and data.
"""
OTHERS = {False: "read it as the full model, without early exit", True: "lack its classifier, of the mean of tokens"}


def write_card(
    folder: Path, config, task: Task, record: dict, split: str = "dev", exits: AllExits | None = None, summary: str = ""
) -> None:
    """Writes the card of the model in `folder`, or only the scores into the metadata of one that is there.

    config: the model's. record: of its training, as in run.json. exits: of the dev set `split`; None: not scored yet.
    summary: of a new card; "": what the model was fine-tuned from.
    """
    file = folder / CARD
    try:
        card = ModelCard.load(file) if file.exists() else new_card(folder, config, task, record, summary)
    except (ValueError, YAMLError):  # a person's own text
        return
    if file.exists() and exits is None:
        return
    if exits is not None:
        card.data.model_name = card.data.model_name or folder.resolve().name
        card.data.eval_results = list(scores(config, task, split, exits))
    with replacing(file) as opened:
        opened.write(f"{card}")


def new_card(folder: Path, config, task: Task, record: dict, summary: str = "") -> ModelCard:
    """The card of a model that has none."""
    start, name = record["arguments"].get("model_name_or_path"), folder.resolve().name
    origin = f", fine-tuned from `{start if record['from_hub'] else Path(start).name}`" if start else ""
    origin = f": {summary}" if summary else origin
    facts = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["deebert", "early-exit"],
        base_model=start if record["from_hub"] else None,
        model_name=name,
    )
    others = OTHERS[config.linear_classifier]
    text = TEXT.format(name=name, config=config, origin=origin, task=task, labels=labels(config), others=others)
    return ModelCard(f"---\n{facts.to_yaml()}\n---\n{text}")


def labels(config) -> str:
    """The labels in the order of the outputs."""
    if config.num_labels == 1:
        return "none, the output is a number (regression)"
    return listing([f"`{' '.join(str(config.id2label[i]).split())}`" for i in range(config.num_labels)], MOST_LABELS)


def scores(config, task: Task, split: str, exits: AllExits) -> Iterator[EvalResult]:
    """The score of every exit, and what the stored threshold scores and costs, as entries of the hub's metadata."""
    metric = task.primary_metric
    values = {f"{metric} after layer {i}": each[metric] for i, each in layer_scores(task, exits).items()}
    threshold = config.exit_threshold
    if exits.exits_early(threshold):
        (row,) = sweep(task, exits, [threshold])
        values |= {f"{metric} at the stored threshold": row.score, "cost at the stored threshold": row.cost}
    if config.min_confidence and task.labels:
        texts, right = answered(exits, threshold, config.min_confidence)
        values["share of the texts that are answered"] = texts / len(exits.labels)
        values["acc of the answered texts"] = right / max(texts, 1)
    for name, value in values.items():
        yield EvalResult(
            task_type="text-classification",
            dataset_type=task.name.lower(),
            dataset_name=task.name,
            dataset_split=split,
            metric_type=name.split()[0],
            metric_name=name,
            metric_value=round(float(value), 4),
        )
