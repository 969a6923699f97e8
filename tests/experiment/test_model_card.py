"""The card of a trained model: what it says, what the hub reads of it, and that nobody's words are lost."""

import re

import pytest
from huggingface_hub import ModelCard
from support.helpers import simulated, with_costs
from support.tiny import tiny_config

from deebert.data.tasks import get_task
from deebert.evaluation.metrics import primary_score
from deebert.experiment.model_card import new_card, write_card

TASK = get_task("SST-2")
RECORD = {"arguments": {"model_name_or_path": "bert-base-uncased"}, "from_hub": True}


@pytest.fixture
def config():
    config = tiny_config("bert", num_hidden_layers=5, exit_threshold=0.4)
    config.architectures = ["DeeBertForSequenceClassification"]
    config.id2label = {0: "bad", 1: "go|od\nx"}
    return config


def metrics(folder) -> dict[str, float]:
    """What the hub shows as the evaluation's results."""
    return {
        result.metric_name: result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results
    }


def test_the_hub_reads_the_scores_and_what_the_threshold_costs(config, tmp_path):
    exits = with_costs(simulated(300, seed=0))
    write_card(tmp_path, config, TASK, RECORD, "dev", exits)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.pipeline_tag) == ("bert-base-uncased", "text-classification")
    assert "license" not in card.data.to_dict()
    layers = exits.exit_layers(0.4)
    expected = {f"acc after layer {i + 1}": (exits.logits[:, i].argmax(-1) == exits.labels).mean() for i in range(5)}
    expected["acc at the stored threshold"] = primary_score(TASK, exits.logits_at(layers), exits.labels)
    expected["cost at the stored threshold"] = exits.cost(layers, 0.4)
    assert metrics(tmp_path) == pytest.approx(expected, abs=1e-4)
    assert "`bad`, `go|od x`" in card.text
    assert len(re.findall("```python", card.text)) == 2


def test_a_card_without_scores_or_a_name_on_the_hub(config, tmp_path):
    (tmp_path / "secret" / "base").mkdir(parents=True)
    record = {"arguments": {"model_name_or_path": str(tmp_path / "secret" / "base")}, "from_hub": False}
    write_card(tmp_path, config, TASK, record)
    text = (tmp_path / "README.md").read_text()
    assert "from `base`" in text
    assert "secret" not in text
    assert "base_model" not in text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_a_persons_words_stay(config, tmp_path):
    card, exits = tmp_path / "README.md", simulated(50, seed=0)
    write_card(tmp_path, config, TASK, RECORD)
    card.write_text(card.read_text().replace("---\n\n", "license: mit\n---\n\n", 1) + "my words\n")
    write_card(tmp_path, config, TASK, RECORD, "dev", exits)
    assert "my words" in card.read_text()
    assert ModelCard.load(card).data.license == "mit"
    assert len(metrics(tmp_path)) >= 5
    written = card.read_text()
    write_card(tmp_path, config, TASK, RECORD)  # a new training
    assert card.read_text() == written


@pytest.mark.parametrize("text", [b"\xff\xfe", b"---\n- a: [\n---\nmine", b"---\nlicense\n---\n"])
def test_a_readme_that_is_no_card_stays(config, tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    write_card(tmp_path, config, TASK, RECORD, "dev", simulated(50, seed=0))
    assert (tmp_path / "README.md").read_bytes() == text


def test_what_other_tools_read_of_the_model(config, tmp_path):
    for pooling, expected in (("cls", "read it as the full model"), ("mean", "lack its classifier")):
        config.classifier_pooling = pooling
        assert f"plain encoder only\n{expected}" in new_card(tmp_path, config, TASK, RECORD).text
