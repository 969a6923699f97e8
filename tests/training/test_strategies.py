"""Every training strategy's loss and steps against a few lines of plain Python."""

import math
from itertools import combinations, product
from unittest.mock import patch

import pytest
import torch
from support.helpers import train
from support.tiny import BACKBONES, random_batch, tiny_model, tiny_tokenizer
from torch.nn import functional

from deebert.data.batching import TrainBatches, collator, tokenize
from deebert.data.tasks import TASKS
from deebert.experiment.arguments import parse_args
from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.exit_rules import EXIT_RULES, make_rule
from deebert.modeling.off_ramps import POOLINGS, is_off_ramp
from deebert.training.losses import TEMPERATURE, training_loss
from deebert.training.strategies import STRATEGIES, Stage, TrainSettings

LAYERS = 4
RULES = tuple(EXIT_RULES)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def data(tiny_data, task="SST-2"):
    return tokenize(TASKS[task].read(tiny_data / task, "train"), tiny_tokenizer("bert"), 32)


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_equals_a_plain_loop(labels, share):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, LAYERS, labels, generator=generator)
    y = torch.randn(5, generator=generator) if labels == 1 else torch.randint(labels, (5,), generator=generator)
    weights = [0.5, 2.0, 0.0, 3.0]

    expected = 0.0
    for sample, layer in product(range(5), range(LAYERS)):
        logits, other = z[sample, layer].double(), z[sample, -1].double()
        if labels == 1:
            hard, soft = (logits[0] - y[sample]) ** 2, (logits[0] - other[0]) ** 2
        else:
            hard = -math.log(logits.softmax(0)[y[sample]])
            p, q = (other / TEMPERATURE).softmax(0), (logits / TEMPERATURE).softmax(0)
            soft = TEMPERATURE**2 * (p * (p / q).log()).sum()
        loss = hard if layer == LAYERS - 1 else (1 - share) * hard + share * soft
        expected += weights[layer] * loss / 5

    loss, _ = training_loss(HighwayClassifierOutput(all_logits=z), y, weights, share)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_distillation_gives_the_final_classifier_no_gradient():
    z = torch.randn(5, LAYERS, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])
    training_loss(HighwayClassifierOutput(all_logits=z), labels, [1.0, 1, 1, 0], distill=1.0)[0].backward()
    assert z.grad[:, -1].abs().max() == 0
    assert z.grad[:, :-1].abs().min() > 0


def test_weights_of_the_strategies():
    stages = {name: [stage.weights(4, 1) for stage in stages] for name, stages in STRATEGIES.items()}
    assert stages == {
        "two_stage": [[0, 0, 0, 1], [1, 1, 1, 0]],
        "joint": [[1, 1, 1, 1]],
        "weighted": [[0.1, 0.2, 0.3, 0.4]],
        "alternating": [[0, 0, 0, 1]],
        "mixed": [[0, 0, 0, 1], [1, 1, 1, 1]],
    }
    assert STRATEGIES["alternating"][0].weights(4, 2) == [1, 1, 1, 1]
    assert STRATEGIES["alternating"][0].weights(4, 3) == [0, 0, 0, 1]


@pytest.mark.parametrize("strategy", ["joint", "weighted", "alternating"])
def test_two_steps_equal_a_plain_loop(strategy, tiny_data):
    """Two optimizer steps of all parameters, the off-ramps at their own rate, against a plain loop."""
    model, reference = (tiny_model("bert", **NO_DROPOUT) for _ in range(2))
    features = data(tiny_data)
    settings = TrainSettings(
        learning_rate=1e-3,
        highway_learning_rate=4e-3,
        adam_epsilon=1e-2,
        max_steps=2,
        train_strategy=strategy,
        logging_steps=0,
        save_steps=0,
    )
    train(1, model, features, settings)

    rates = {True: 4e-3, False: 1e-3}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rates[".highway." in name]} for name, p in reference.named_parameters()],
        eps=1e-2,
        weight_decay=0,
    )
    batches = TrainBatches(features.lengths, 8, 42).epoch(0)[:2]
    for step, indices in enumerate(batches):
        batch = collator(model.config)(features, indices)
        labels, _ = batch.pop("labels"), batch.pop("index")
        z = reference(**batch, output_all_exits=True).all_logits
        losses = [functional.cross_entropy(z[:, i], labels) for i in range(LAYERS)]
        if strategy == "joint":
            loss = sum(losses)
        elif strategy == "weighted":
            loss = sum(i * one for i, one in enumerate(losses, 1)) / 10
        else:
            loss = sum(losses) if step == 1 else functional.cross_entropy(reference(**batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["params"][0] in set(reference.bert.encoder.highway.parameters())] * (1 - step / 2)
        optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


def pairwise_cover(*factors) -> list[tuple]:
    """Few combinations among which each value of a factor meets each value of every other one."""
    every = [case for case in product(*factors) if make_rule(case[3], case[4]).supported]
    pairs = {case: set(combinations(enumerate(case), 2)) for case in every}
    missing, cover = set().union(*pairs.values()), []
    while missing:
        cover.append(max(every, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[cover[-1]]
    return cover


COVER = pairwise_cover(BACKBONES, tuple(POOLINGS), tuple(STRATEGIES), RULES, (1, 2), (False, True))


def test_the_cover_has_each_pair_of_choices():
    assert len(STRATEGIES) * len(RULES) <= len(COVER) < 40
    assert {(case[1], case[3]) for case in COVER} == set(product(POOLINGS, RULES))
    assert {(case[2], case[3]) for case in COVER} == set(product(STRATEGIES, RULES))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_pair_of_choices_trains_saves_loads_and_exits_alike(backbone, tmp_path):
    for _, pooling, strategy, rule, labels, linear in (case for case in COVER if case[0] == backbone):
        exit_0 = linear and pooling != "first"
        model = tiny_model(
            backbone,
            num_labels=labels,
            highway_pooling=pooling,
            highway_head="linear" if linear else "pooler",
            exit_before_first_layer=exit_0,
            exit_rule=rule,
            patience_tolerance=2.0,
        )
        batch = random_batch(model.config, [3, 9, 5, 7])
        y = torch.tensor([0, 1, 1, 0]) if labels == 2 else torch.tensor([0.1, 2.0, 1.0, 0.0])
        for stage in STRATEGIES[strategy]:
            model.train().train_stage(stage.trains)
            model.zero_grad()
            weights = stage.weights(LAYERS + exit_0, 2)
            output = model(**batch, output_all_exits=any(weights[:-1]), train_highway=stage.trains == "off_ramps")
            training_loss(output, y, weights, distill=0.5)[0].backward()
            for name, parameter in model.named_parameters():
                head = is_off_ramp(name)
                # the pooler is frozen, and does not count, where stage 2 leaves the final classifier out
                assert (parameter.grad is not None) == (stage.trains in ("all", "off_ramps" if head else "backbone")), (
                    name
                )
        model.eval()
        with torch.no_grad():
            full = model(**batch, output_all_exits=True, exit_threshold=-1)
        uncertainties = make_rule(rule, labels, 2.0).uncertainties(full.all_logits)
        model.set_exit_threshold(2.0 if rule == "patience" else uncertainties[:, 0].median().item() + 1e-4)
        model.save_pretrained(tmp_path)
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            ours, theirs = model(**batch), again.eval()(**batch)
        assert torch.equal(ours.exit_layer, theirs.exit_layer)
        assert rule == "patience" or len(ours.exit_layer.unique()) > 1
        torch.testing.assert_close(ours.logits, theirs.logits)


def test_unknown_choices_are_refused():
    for field, value in (("highway_pooling", "last"), ("highway_head", "deep"), ("exit_rule", "boredom")):
        with pytest.raises(ValueError, match=f"{field} is '{value}'; choose one of"):
            tiny_model("bert", **{field: value})


def test_a_strategy_that_is_registered_late_is_a_choice():
    one_exit = Stage("all", lambda exits, step: [float(i == step % exits) for i in range(exits)])
    with patch.dict(STRATEGIES, one_at_a_time=(one_exit,)):
        args = parse_args(["--do_train", "--output_dir=x", "--model_name_or_path=y", "--train_strategy=one_at_a_time"])
    assert args.training.train_strategy == "one_at_a_time"


def test_weights_may_be_without_gradient_where_exits_are_skipped():
    skipping = {name for name, stages in STRATEGIES.items() if any(stage.skips_off_ramps for stage in stages)}
    assert skipping == {"alternating"}
    assert Stage("all", lambda exits, step: [float(step % 7 > 0)] * exits).skips_off_ramps
