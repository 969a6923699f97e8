"""README.md of a trained model: what it is, what its exits score, what its threshold costs and saves, how to load it.

A card carries the hash of its own text in its last line. Where text and hash differ, or there is no hash, a person has
written in it, and it stays as it is.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, layer_scores
from deebert.evaluation.metrics import primary_score
from deebert.utils.files import replacing

CARD = "README.md"
MARK = re.compile(r"<!-- written by deebert, which replaces this file until you edit it: ([0-9a-f]{64}) -->\n\Z")
MOST_LABELS = 100

LOADING = """
In Python, with the package `deebert` installed, and FOLDER this folder or its name on the hub:

```python
from deebert import {model_class}

model = {model_class}.from_pretrained("FOLDER").eval()
```

```python
import deebert
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER")
```

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("FOLDER", trust_remote_code=True).eval()
```

On the command line: `deebert predict --model FOLDER < texts.txt`. Tools that know {plain} only read it as the full
model, without early exit.
"""


def write_card(
    folder: Path,
    config,
    task: Task,
    base_model: str | None,
    on_hub: bool,
    split: str = "dev",
    exits: AllExits | None = None,
) -> bool:
    """Writes the card of the model in `folder`. False where a person has edited the card: it is left as it is.

    config: the model's. base_model: a name on the hub (on_hub) or a folder, None if it is not known. exits: of the dev
    set `split`; None: the model has not been scored.
    """
    file = folder / CARD
    if file.exists() and not is_ours(file):
        return False
    text = card_text(folder, config, task, base_model, on_hub, split, exits)
    with replacing(file) as card:
        card.write(f"{text}\n{mark(text)}\n")
    return True


def is_ours(file: Path) -> bool:
    """Whether nobody has edited this card since it was written."""
    text = file.read_text(encoding="utf-8", errors="replace")
    found = MARK.search(text)
    return found is not None and mark(text[: found.start() - 1]) == found[0].rstrip()


def mark(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"<!-- written by deebert, which replaces this file until you edit it: {digest} -->"


def card_text(
    folder: Path, config, task: Task, base_model: str | None, on_hub: bool, split: str, exits: AllExits | None
) -> str:
    """The card, without its mark."""
    backbone = (
        type(config)
        .__name__.removeprefix("Dee")
        .removesuffix("Config")
        .replace("Bert", "BERT")
        .replace("Roberta", "RoBERTa")
    )
    facts = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["deebert", "early-exit"]}
    facts |= {"base_model": base_model} if on_hub else {}
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in facts.items())  # JSON is YAML
    origin = "" if base_model is None else f", fine-tuned from `{base_model if on_hub else Path(base_model).name}`"
    parts = [
        f"---\n{head}\n---\n",
        f"# {folder.resolve().name}\n",
        f"A {backbone} of {config.num_hidden_layers} layers with early exit (DeeBERT, Xin et al., ACL 2020){origin}.\n",
        f"- Task: {task.name}\n- Labels: {labels(config)}",
        f"- Exit rule: {config.exit_rule}, threshold {threshold_text(config.exit_threshold)}\n",
        "## Scores\n",
        "It has not been scored." if exits is None else scores_text(config, task, split, exits),
        "\n## How to load it",
        LOADING.format(model_class=config.architectures[0], plain=backbone),
        "## Licence\n",
        "None is chosen here. Add a line `license: ...` at the top. Mind the licences of base model and data.",
    ]
    return "\n".join(parts)


def labels(config) -> str:
    """The labels in the order of the outputs."""
    if config.num_labels == 1:
        return "none, the output is a number (regression)"
    names = [f"`{' '.join(str(config.id2label[i]).split())}`" for i in range(config.num_labels)]
    more = f" and {len(names) - MOST_LABELS} more" if len(names) > MOST_LABELS else ""
    return ", ".join(names[:MOST_LABELS]) + more


def threshold_text(threshold: float | Sequence[float]) -> str:
    values = [threshold] if isinstance(threshold, int | float) else threshold
    shown = " ".join(f"{value:g}" for value in values)
    return shown if any(value > 0 for value in values) else f"{shown} (no sample exits early until you set one)"


def scores_text(config, task: Task, split: str, exits: AllExits) -> str:
    """The exits' scores on a dev set, and what the stored threshold costs and saves there."""
    metric = task.primary_metric
    lines = [
        f"On {len(exits.logits):,} samples of `{split}`:\n",
        f"| exit after layer | {metric} (%) |",
        "| ---: | ---: |",
    ]
    each_layer = layer_scores(task, exits)
    lines += [f"| {layer} | {100 * scores[metric]:.2f} |" for layer, scores in each_layer.items()]
    threshold = config.exit_threshold
    if max(exits.cutoffs(threshold), default=0) > 0:
        layers = exits.exit_layers(threshold)
        score, cost = primary_score(task, exits.logits_at(layers), exits.labels), exits.cost(layers, threshold)
        saved = [f"{100 * (1 - layers.mean() / exits.num_layers):.1f} % of the layers"]
        saved += [f"{100 * (1 - cost):.1f} % of the cost (floating-point operations)"]
        change = 100 * (score - exits.full_score(task))
        saving = f"The stored threshold saves {' and '.join(saved)}"
        lines.append(f"\n{saving}; {metric} is {100 * score:.2f} ({change:+.2f} points).")
        lines.append("Where it was chosen on these samples, both are a little flattering.")
    return "\n".join(lines)
