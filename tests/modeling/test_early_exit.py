"""The exit rule and the layer loop: every way to get logits gives the same logits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import softmax
from support.tiny import random_batch, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, BertForSequenceClassification, RobertaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deebert.modeling.backbones.bert import entropy
from deebert.modeling.early_exit import ActiveBatch, ExitRequest, exits_now, first_exit_layer
from deebert.modeling.exit_rules import make_rule
from deebert.modeling.off_ramps import mean_weights
from deebert.runtime.onnx_export import additive_mask

MODELS = {  # both heads, and both poolings
    "bert": tiny_model("bert"),
    "roberta": tiny_model("roberta", highway_pooling="mean", highway_head="linear"),
    "bert, exit 0": tiny_model("bert", highway_pooling="mean", exit_before_first_layer=True),
    "roberta, exit 0": tiny_model(
        "roberta", highway_pooling="mean", highway_head="linear", exit_before_first_layer=True
    ),
}


def brute_force(all_logits: torch.Tensor, thresholds: list[float]) -> list[int]:
    """The paper's inference loop, written out for one sample after the other: the exit, from 0, of each."""
    exits = []
    for logits in all_logits:
        for i, threshold in enumerate([*thresholds, math.inf]):
            if scipy.stats.entropy(softmax(logits[i].double().numpy())) < threshold:
                exits.append(i)
                break
    return exits


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-1e4, 1e4)))
def test_entropy_is_scipys(logits):
    expected = scipy.stats.entropy(softmax(logits, axis=-1), axis=-1)
    np.testing.assert_allclose(entropy(torch.from_numpy(logits)).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(entropy(torch.from_numpy(logits).float()).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [([1e4, -1e4], 0), ([-1e4, -1e4, 1e4], 0), ([0, 0, 0], math.log(3)), ([3, -math.inf], 0), ([7], 0)],
)
def test_entropy_of_extreme_logits(logits, expected):
    assert entropy(torch.tensor(logits, dtype=torch.float32)).item() == pytest.approx(expected, abs=1e-6)


def test_sure_samples_exit_and_nan_never():
    logits = torch.tensor([[1e4, -1e4], [math.nan, 1.0], [0.0, 0.0]])
    uncertainty, _ = make_rule("entropy", 2).uncertainty(logits)
    assert (uncertainty < 0.5).tolist() == [True, False, False]
    assert entropy(logits[1]).isnan()


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_an_uncertainty_that_equals_the_threshold_does_not_exit(kind):
    """The paper's decision is entropy < threshold."""
    assert [bool(exits_now(kind(x), 0.5)) for x in (0.25, 0.5, 0.75)] == [True, False, False]
    assert first_exit_layer(torch.tensor([[0.5, 0.5], [0.5, 0.25]]), [0.5, 0.5]).tolist() == [3, 2]


def test_entropy_of_half_precision_is_computed_in_float32():
    assert entropy(torch.tensor([8.0, 0.0], dtype=torch.bfloat16)).dtype == torch.float32


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(MODELS)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    padding=st.sampled_from([0, 7]),
    quantile=st.floats(0, 1),
    per_layer=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_batch_equals_single_samples_and_the_brute_force(name, lengths, padding, quantile, per_layer, seed):
    model = MODELS[name]
    batch = random_batch(model.config, lengths, seed, padding)
    with torch.no_grad():
        full = model(**batch, output_all_exits=True)
        entropies = entropy(full.all_logits[:, :-1])
        # between two entropies, so that rounding does not decide
        columns = entropies.unbind(dim=1) if per_layer else [entropies] * entropies.shape[1]
        edges = [torch.quantile(column, quantile).item() + 3e-6 for column in columns]
        threshold = edges if per_layer else edges[0]
        assume((entropies - torch.tensor(edges)).abs().min() >= 2e-6)
        together = model(**batch, exit_threshold=threshold)
        unpacked = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(lengths))]
        if not padding:
            unpacked = [{name: t[:, :n] for name, t in one.items()} for one, n in zip(unpacked, lengths, strict=True)]
        alone = [model(**one, exit_threshold=threshold) for one in unpacked]

    exits = brute_force(full.all_logits, edges)
    layers = [i if "exit 0" in name else i + 1 for i in exits]
    assert together.exit_layer.tolist() == layers
    assert [one.exit_layer.item() for one in alone] == layers
    expected = full.all_logits[torch.arange(len(lengths)), torch.tensor(exits)]
    torch.testing.assert_close(together.logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([one.logits for one in alone]), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.entropy, entropy(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_and_attention_backend_change_nothing(backbone, attention, pooling):
    model = tiny_model(backbone, highway_pooling=pooling, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    lengths = [3, 17, 9, 1, 12, 6]
    with torch.no_grad():
        wide = model(**random_batch(model.config, lengths, padding=20), output_all_exits=True)
        thresholds = entropy(wide.all_logits[:, :-1]).median(dim=0).values + 1e-5
        narrow = random_batch(model.config, lengths, padding=20)
        narrow = {name: tensor[:, : max(lengths)] for name, tensor in narrow.items()}
        early = model(**narrow, exit_threshold=thresholds.tolist())
    assert len(set(early.exit_layer.tolist())) > 1
    assert early.exit_layer.tolist() == first_exit_layer(entropy(wide.all_logits[:, :-1]), thresholds.tolist()).tolist()
    expected = wide.all_logits[torch.arange(len(lengths)), early.exit_layer - 1]
    torch.testing.assert_close(early.logits, expected, atol=1e-5, rtol=1e-4)


def test_mean_pooling_reads_the_tokens_and_not_the_padding():
    model = tiny_model("bert", highway_pooling="mean")
    states = torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    highway = model.bert.encoder.highway[0]
    expected = torch.stack([states[0, :3].mean(0), states[1].mean(0)])
    weights = mean_weights(mask, torch.float32)
    logits, read = highway(states, weights), highway.pooled_state(states, weights)
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(logits, highway.classifier(torch.tanh(highway.pooler.dense(expected))))
    torch.testing.assert_close(highway.pooled_state(states[1:], None), expected[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_row_of_padding_only_has_finite_logits(pooling, dtype):
    model = tiny_model("bert", highway_pooling=pooling).to(dtype)
    weights = mean_weights(torch.tensor([[0, 0, 0], [1, 1, 0]]), dtype)
    logits = model.bert.encoder.highway[0](torch.randn(2, 3, 32, dtype=dtype), weights)
    assert logits.isfinite().all()


def test_samples_that_exited_are_not_computed_any_further(monkeypatch):
    model = MODELS["bert"]
    batch = random_batch(model.config, [4, 20, 6, 9])
    sizes = []
    hooks = [
        layer.output.register_forward_hook(lambda _, args, out: sizes.append(tuple(args[0].shape[:2])))
        for layer in model.bert.encoder.layer
    ]
    with torch.no_grad():
        all_logits = model(**batch, output_all_exits=True).all_logits
        first = entropy(all_logits[:, 0])
        # the longest sample exits at layer 1, with those that are surer
        of_the_longest = first[1].item()
        sizes.clear()
        output = model(**batch, exit_threshold=[of_the_longest + 1e-5, -1, -1])
    for hook in hooks:
        hook.remove()
    stays = (first > of_the_longest + 1e-5).nonzero().squeeze(1)
    longest = batch["attention_mask"][stays].sum(1).max().item()
    assert 0 < len(stays) < 4
    assert sizes == [(4, 20)] + [(len(stays), longest)] * 2 + [(len(stays), 1)]  # the last: of the first token alone
    assert output.exit_layer[1] == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_layer_of_the_first_token_is_hugging_faces(backbone, attention):
    model = tiny_model(backbone, attn_implementation=attention)
    encoder = model.base_model.encoder
    hidden = torch.randn(3, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    added = additive_mask(model, kept.long())
    causal = torch.ones(11, 11).tril() == 0
    masks = [None, added, added.masked_fill(causal, added.min())]
    if attention == "sdpa":
        masks.append(kept[:, None, None].expand(3, 1, 11, 11))
    with torch.no_grad():
        for mask in masks:
            short = encoder.first_token_layer(hidden, mask)
            torch.testing.assert_close(short, encoder.layer[-1](hidden, mask)[:, :1])


def test_a_model_that_never_exits_takes_the_masks_that_its_backbone_takes():
    model = tiny_model("bert", highway_pooling="mean")
    batch = random_batch(model.config, [7, 4])
    added = additive_mask(model, batch["attention_mask"]).expand(2, 1, 7, 7)
    with torch.no_grad():
        output = model(batch["input_ids"], attention_mask=added, exit_threshold=-1)
        torch.testing.assert_close(output.logits, model(**batch, exit_threshold=-1).logits)


@pytest.mark.parametrize("reason", ["attention", "decoder"])
def test_the_last_layer_is_the_backbones_own_where_it_attends_otherwise(reason):
    def doubled(module, query, *arguments, **options):
        return sdpa_attention_forward(module, 2 * query, *arguments, **options)

    options = {"is_decoder": True}
    if reason == "attention":
        AttentionInterface.register("doubled", doubled)
        AttentionMaskInterface.register("doubled", sdpa_mask)
        options = {"attn_implementation": "doubled"}
    model = tiny_model("bert", **options)
    ids = random_batch(model.config, [7, 7])["input_ids"]
    with torch.no_grad():
        expected = model.classify(model.bert(ids).last_hidden_state[:, 0])
        torch.testing.assert_close(model(ids, exit_threshold=1e-9).logits, expected)


def test_in_training_mode_the_last_layer_keeps_all_tokens():
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    sizes = []
    model.bert.encoder.layer[-1].register_forward_hook(lambda _, args, out: sizes.append(out.shape[1]))
    model(**random_batch(model.config, [5, 12]), output_all_exits=True)
    assert sizes == [12]


def test_nothing_runs_after_the_last_exit_of_a_batch():
    model = MODELS["roberta"]
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(model.roberta.encoder.layer)
    ]
    batch = random_batch(model.config, [4, 7])
    with torch.no_grad():
        assert model(**batch, exit_threshold=10.0).exit_layer.tolist() == [1, 1]
        assert ran == [0]
        ran.clear()
        middle = model(**batch, output_layer=2)
        assert ran == [0, 1, 2]
        assert middle.exit_layer.tolist() == [3, 3]
        all_logits = model(**batch, output_all_exits=True).all_logits
        torch.testing.assert_close(middle.logits, all_logits[:, 2])
        torch.testing.assert_close(model(**batch, output_layer=3).logits, all_logits[:, 3])
    for hook in hooks:
        hook.remove()


def test_output_layer_gives_that_exits_logits_even_where_they_are_nan():
    model = tiny_model("bert")
    torch.nn.init.constant_(model.bert.encoder.highway[1].classifier.bias, math.nan)
    output = model(**random_batch(model.config, [4, 7]), output_layer=1)
    assert output.exit_layer.tolist() == [2, 2]
    assert output.logits.isnan().all()


@pytest.mark.parametrize("threshold", [-1, 0, 0.0, [-1, 0, 0]])
def test_thresholds_up_to_zero_never_exit(backbone, threshold):
    model = MODELS[backbone]
    torch.manual_seed(0)
    output = model(**random_batch(model.config, [5, 9]), exit_threshold=threshold)
    assert output.exit_layer.tolist() == [4, 4]


def test_threshold_of_config_call_and_layer():
    model = tiny_model("bert")
    batch = random_batch(model.config, [5, 9])
    for value in (5.0, 5, [-1.0, 5.0, 5.0], (-1, 5, 5), np.float32(5)):
        model.set_exit_threshold(value)
        first = 1 if isinstance(value, float | int | np.floating) else 2
        assert model(**batch).exit_layer.tolist() == [first] * 2
        assert model(**batch, exit_threshold=-1).exit_layer.tolist() == [4, 4]
    model.bert.encoder.set_exit_threshold(7)  # the original's way
    assert model.config.exit_threshold == 7.0
    model.train()
    assert model(**batch).exit_layer.tolist() == [4, 4]  # no exits while training


@pytest.mark.parametrize(
    ("value", "labels", "message"),
    [([0.1, 0.2], 2, "2 values"), ([0.1] * 5, 2, "5 values"), (math.nan, 2, "NaN"), (0.1, 1, "regression")],
)
def test_thresholds_that_make_no_sense_are_refused(value, labels, message):
    with pytest.raises(ValueError, match=message):
        make_rule("entropy", labels).cutoffs(value, 4)
    model = tiny_model("bert", num_labels=labels)
    with pytest.raises(ValueError, match=message):
        model.set_exit_threshold(value)
    assert model.config.exit_threshold == -1


def test_output_layer_out_of_range_is_refused():
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="exits 0 to 3"):
            MODELS["bert"](**random_batch(MODELS["bert"].config, [4]), output_layer=layer)


def test_without_exits_bert_is_hugging_faces(tmp_path):
    model = tiny_model("bert", attn_implementation="eager")  # the one that gives attentions
    model.save_pretrained(tmp_path)
    stock = BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = random_batch(model.config, [5, 12, 9], padding=3)
    batch["token_type_ids"] = (torch.arange(15) > 4).long().expand(3, 15)
    batch["labels"] = torch.tensor([1, 0, 1])
    with torch.no_grad():
        ours = model(**batch, output_hidden_states=True, output_attentions=True)
        theirs = stock(**batch, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(model(**batch, output_all_exits=True).logits, theirs.logits)
    for name in ("logits", "loss", "hidden_states", "attentions"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert (len(ours.hidden_states), len(ours.attentions)) == (5, 4)


def test_without_exits_roberta_is_hugging_faces_with_berts_head(tmp_path):
    model = MODELS["roberta"]
    model.save_pretrained(tmp_path)
    stock = RobertaModel.from_pretrained(tmp_path).eval()
    batch = random_batch(model.config, [5, 12, 9], padding=3)
    with torch.no_grad():
        pooled = stock(**batch).pooler_output
        torch.testing.assert_close(model(**batch).logits, model.classifier(pooled))
        torch.testing.assert_close(model(**batch, output_hidden_states=True).logits, model.classifier(pooled))


def test_hidden_states_are_those_of_full_batches(backbone):
    model = MODELS[backbone]
    batch = random_batch(model.config, [5, 12, 9])
    with torch.no_grad():
        plain = model(**batch, exit_threshold=0.5)
        full = model(**batch, exit_threshold=0.5, output_hidden_states=True)
    assert [tuple(states.shape) for states in full.hidden_states] == [(3, 12, 32)] * 5
    assert full.exit_layer.tolist() == plain.exit_layer.tolist()
    torch.testing.assert_close(full.logits, plain.logits)
    assert full.all_logits is None


def test_tuple_output(backbone):
    model = MODELS[backbone]
    batch = random_batch(model.config, [5, 12])
    logits, exit_layer, entropies = model(**batch, return_dict=False)
    assert logits.shape == (2, 2)
    assert exit_layer.tolist() == [4, 4]
    assert entropies.shape == (2,)


def test_mean_pooling_needs_the_padding_mask():
    model = tiny_model("bert", highway_pooling="mean")
    batch = random_batch(model.config, [4, 4])
    batch["attention_mask"] = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask"):
        model(**batch, exit_threshold=0.3)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("threshold", [-1, 0.4, math.inf])
def test_a_row_of_padding_only_harms_no_other(backbone, pooling, threshold):
    model = tiny_model(backbone, highway_pooling=pooling)
    batch = random_batch(model.config, [7, 3, 12, 1])
    batch["attention_mask"][1] = 0
    with torch.no_grad():
        full = model(**batch, output_all_exits=True).all_logits
        for exit_threshold in [threshold, *(entropy(full[:, :-1]).flatten() + 3e-6).tolist()]:
            output = model(**batch, exit_threshold=exit_threshold)
            assert output.logits.isfinite().all()
            others = {name: tensor[[0, 2, 3]] for name, tensor in batch.items()}
            expected = model(**others, exit_threshold=exit_threshold)
            torch.testing.assert_close(output.logits[[0, 2, 3]], expected.logits, atol=1e-4, rtol=1e-4)


def wrapped(model, layer):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, *args, **kwargs):
            return 0 * self.inner(*args, **kwargs)

    model.bert.encoder.layer[-1] = Wrapper()


def patched(model, layer):
    """As accelerate's device maps do it."""
    layer.attention.forward, own = lambda *args, **kwargs: (0 * own(*args, **kwargs)[0], None), layer.attention.forward


def of_another_class(model, layer):
    """As FSDP2 shards a layer."""

    class ShardedLayer(type(layer)):
        def forward(self, *args, **kwargs):
            return 0 * super().forward(*args, **kwargs)

    layer.__class__ = ShardedLayer


CHANGES = {  # each changes what the last layer gives, by means that are not its weights
    "hook": lambda model, layer: layer.register_forward_hook(lambda module, args, output: 0 * output),
    "pre-hook": lambda model, layer: layer.register_forward_pre_hook(lambda module, args: (0 * args[0], *args[1:])),
    "hook on the attention": lambda model, layer: layer.attention.self.register_forward_hook(
        lambda module, args, output: (0 * output[0], *output[1:])
    ),
    "wrapper": wrapped,
    "patched forward": patched,
    "another class": of_another_class,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("threshold", [-1, 1e-9])
def test_what_is_tied_to_the_last_layer_is_heard(change, threshold):
    """The last layer for the first token alone calls no hooks and no wrapper: so the backbone's own runs."""
    model = tiny_model("bert")
    batch = random_batch(model.config, [5, 9])
    with torch.no_grad():
        before = model(**batch, exit_threshold=threshold).logits
        CHANGES[change](model, model.bert.encoder.layer[-1])
        expected = model.classify(model.bert(**batch).last_hidden_state[:, 0])
        output = model(**batch, exit_threshold=threshold).logits
    torch.testing.assert_close(output, expected)
    assert (output - before).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_layer_is_short_with_both_attentions_and_after_hidden_states_were_requested(attention):
    model = tiny_model("bert", attn_implementation=attention)
    batch, sizes = random_batch(model.config, [5, 9]), []
    model.bert.encoder.layer[-1].output.register_forward_hook(lambda _, args, output: sizes.append(output.shape[1]))
    with torch.no_grad():
        for request in ({}, {"output_hidden_states": True}, {}):  # transformers leaves its hooks on the layers
            model(**batch, **request)
    assert sizes == [1, 9, 1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_model_gives_the_same(mode):
    model = tiny_model("bert", highway_pooling="mean")
    batch = random_batch(model.config, [4, 9, 6, 3])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for options in ({"exit_threshold": -1}, {"exit_threshold": 0.5}, {"output_all_exits": True}):
        with mode():
            expected, output = model(**batch, **options), compiled(**batch, **options)
        assert output.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(TracerWarning|trace|jit).*")
@pytest.mark.parametrize("way", ["torch.export", "torch.jit.trace"])
def test_a_trace_is_of_the_full_model_with_any_batch_size(backbone, way):
    model = tiny_model(backbone, highway_pooling="mean", exit_threshold=0.5)
    one, other = random_batch(model.config, [4, 9]), random_batch(model.config, [3, 8, 5])

    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask, exit_threshold=-1).logits

    class Early(Full):
        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask).logits

    def trace(module):
        if way == "torch.jit.trace":
            return torch.jit.trace(module, tuple(one.values()), check_trace=False)
        sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in one}
        return torch.export.export(module, (), dict(one), dynamic_shapes=sizes).module()

    with torch.no_grad():
        traced = trace(Full().eval())
        torch.testing.assert_close(traced(**other), model(**other, exit_threshold=-1).logits, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="a trace keeps the exits of its own batch"):
            trace(Early().eval())


@pytest.mark.parametrize("size", [1, 2])
def test_an_uncertainty_in_float32_is_not_below_the_same_threshold(size):
    """0.7 in float32 is a little less than 0.7 in float64."""
    uncertainty = torch.full((size,), 0.7)
    cutoffs = make_rule("confidence", 2).cutoffs(0.7, num_exits=2)
    batch = ActiveBatch(np.arange(size), hidden_states=torch.zeros(size, 1, 2))
    request = ExitRequest(batch, SimpleNamespace(uncertainty=lambda *_: (uncertainty, None)), cutoffs, [1, 2])
    request.let_exit(0, torch.zeros(size, 2))
    assert len(request.batch) == size
    assert first_exit_layer(uncertainty[:, None], cutoffs).tolist() == [2] * size
