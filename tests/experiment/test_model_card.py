"""The card of a trained model: what it says, and that nobody's edits are lost."""

import re

import pytest
from helpers import simulated, with_costs
from tiny import tiny_config

from deebert.data.tasks import get_task
from deebert.evaluation.metrics import primary_score
from deebert.experiment.model_card import is_ours, write_card

TASK = get_task("SST-2")


@pytest.fixture
def config():
    config = tiny_config("bert", num_hidden_layers=5, exit_threshold=0.4)
    config.architectures = ["DeeBertForSequenceClassification"]
    config.id2label = {0: "bad", 1: "go|od\nx"}
    return config


def test_the_card_has_the_scores_and_what_the_threshold_costs_and_saves(config, tmp_path):
    exits = with_costs(simulated(300, seed=0))
    assert write_card(tmp_path, config, TASK, "bert-base-uncased", True, "dev", exits)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: ")
    assert 'base_model: "bert-base-uncased"' in text
    assert "license:" not in text.split("---")[1]
    for layer in range(5):
        score = (exits.logits[:, layer].argmax(-1) == exits.labels).mean()
        assert f"| {layer + 1} | {100 * score:.2f} |" in text
    layers = exits.exit_layers(0.4)
    score = primary_score(TASK, exits.logits_at(layers), exits.labels)
    saved = 1 - exits.cost(layers, 0.4)
    assert f"saves {100 * (1 - layers.mean() / 5):.1f} % of the layers and {100 * saved:.1f} % of the cost" in text
    assert f"acc is {100 * score:.2f}" in text
    assert "`bad`, `go|od x`" in text
    assert len(re.findall("```python", text)) == 3


def test_a_card_without_scores_threshold_or_name_on_the_hub(config, tmp_path):
    config.exit_threshold = [-1.0] * 4
    (tmp_path / "secret" / "base").mkdir(parents=True)
    assert write_card(tmp_path, config, TASK, str(tmp_path / "secret" / "base"), False)
    text = (tmp_path / "README.md").read_text()
    assert "has not been scored" in text
    assert "no sample exits early until you set one" in text
    assert "from `base`" in text
    assert "secret" not in text
    assert "base_model" not in text


@pytest.mark.parametrize(
    "edit", [lambda t: t + "my words\n", lambda t: t.replace("bad", "good"), lambda t: "mine", lambda t: ""]
)
def test_an_edited_card_is_never_overwritten(config, tmp_path, edit):
    card, exits = tmp_path / "README.md", simulated(50, seed=0)
    assert write_card(tmp_path, config, TASK, None, False)
    before = card.read_text()
    assert write_card(tmp_path, config, TASK, None, False, "dev", exits)
    assert card.read_text() != before
    edited = edit(card.read_text())
    card.write_text(edited)
    assert not is_ours(card)
    assert not write_card(tmp_path, config, TASK, None, False)
    assert card.read_text() == edited


def test_a_readme_that_is_no_text_stays(config, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert not write_card(tmp_path, config, TASK, None, False)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
