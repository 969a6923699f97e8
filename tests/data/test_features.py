"""Tokenization and batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_config, tiny_model, tiny_tokenizer

from deebert.data.batching import TrainBatches, collator, eval_batches, fingerprint, tokenize
from deebert.data.tasks import TASKS, Example
from deebert.evaluation.all_exits import run_all_exits

SST2 = TASKS["SST-2"]


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer("bert")


def test_pairs_are_cut_to_the_maximum_and_have_token_types(backbone, tmp_path):
    tokenizer = tiny_tokenizer(backbone)
    examples = [Example(("good film " * 10, "bad plot"), 1), Example(("a", "b"), 0)]
    tokenized = tokenize(examples, tokenizer, 16)
    assert tokenized.lengths.tolist()[0] == 16
    assert tokenized.cut_note() == "1 of 2 texts (50 %) have more than 16 tokens and were cut"
    assert tokenize(examples, tokenizer, 200).cut_note() is None
    assert tokenized.labels.tolist() == [1, 0]
    ids = tokenizer(*examples[1].texts)["input_ids"]
    assert tokenized.input_ids[16:].tolist() == ids
    if backbone == "bert":
        assert tokenized.token_type_ids[16:].tolist() == [0, 0, 0, 1, 1]
    batch = collator(tiny_config(backbone))(tokenized, [1, 0])
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), 16]
    assert (batch["input_ids"][0, len(ids) :] == tokenizer.pad_token_id).all()
    assert batch["token_type_ids"].max() == (1 if backbone == "bert" else 0)
    assert batch["index"].tolist() == [1, 0]


def test_regression_labels_are_floats(tokenizer):
    tokenized = tokenize([Example(("a", "b"), 3.25), Example(("a", "b"), 0.0)], tokenizer, 16)
    assert tokenized.labels.dtype == np.float32
    assert collator(tiny_config("bert"))(tokenized, [0, 1])["labels"].tolist() == [3.25, 0.0]


def test_a_file_without_labels(tokenizer, tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta good film\n")
    tokenized = tokenize(SST2.read(tmp_path, "test"), tokenizer, 32)
    assert tokenized.labels is None
    assert "labels" not in collator(tiny_config("bert"))(tokenized, [0])


def test_a_tokenizers_fingerprint_does_not_depend_on_its_last_call(tokenizer):
    before = fingerprint(tokenizer)
    tokenizer(["a good film"] * 3, truncation=True, max_length=4, padding="max_length")
    assert fingerprint(tokenizer) == before


def test_a_tokenizers_fingerprint_depends_on_the_truncation_side(tokenizer):
    before = fingerprint(tokenizer)
    tokenizer.truncation_side = "left"
    assert fingerprint(tokenizer) != before


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_steps_do_not_depend_on_processes_and_accumulation(samples, batch_size, accumulation, processes, data):
    """Every process has the same number of micro-batches, and their weights give the mean over the step's samples."""
    lengths = np.arange(samples) % 17 + 1
    shards = [TrainBatches(lengths, batch_size, 0, accumulation, processes, rank) for rank in range(processes)]
    per_epoch = len(shards[0])
    single = TrainBatches(lengths, batch_size * accumulation * processes, 0)
    assert per_epoch == len(single)
    total = data.draw(st.integers(1, 3 * per_epoch))
    done = data.draw(st.integers(0, total))
    values, steps = np.random.default_rng(0).random(samples), single.steps(done, total)
    means, seen = np.zeros(total - done), [set() for _ in range(total - done)]
    for parts in zip(*(shard.micro_batches(done, total) for shard in shards), strict=True):
        assert len({part.last for part in parts}) == 1
        made = total - done - len(means)
        for part in parts:
            assert len(part.rows) <= batch_size
            means[0] += part.weight * values[part.rows].mean() / processes
            seen[made] |= set(part.rows)
        if parts[0].last:
            expected = next(steps)
            assert seen[made] == set(expected.tolist()) == set(parts[0].step_rows.tolist())
            assert means[0] == pytest.approx(values[expected].mean())
            means = means[1:]
    assert len(means) == 0
    assert next(steps, None) is None


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5))
def test_every_sample_is_in_one_batch(lengths, batch_size, seed):
    lengths = np.array(lengths)
    sampler = TrainBatches(lengths, batch_size, seed)
    epochs = []
    for epoch in (0, 1, 0):
        epochs.append([batch.tolist() for batch in sampler.epoch(epoch)])
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(len(lengths)))
        assert len(epochs[-1]) == len(sampler)
        assert max(map(len, epochs[-1])) <= batch_size
        assert all(len(batch) == batch_size for batch in epochs[-1][:-1])  # a smaller one comes last
    assert epochs[0] == epochs[2]
    if len(lengths) > 20:
        assert epochs[0] != epochs[1]
    batches = eval_batches(lengths, batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


def test_batches_are_of_similar_lengths():
    lengths = np.random.default_rng(0).integers(5, 100, 2000)

    def padded(batches) -> int:
        return sum(lengths[batch].max() * len(batch) for batch in batches)

    assert padded(TrainBatches(lengths, 8, 0).epoch(0)) < 1.1 * lengths.sum()
    assert padded(eval_batches(lengths, 8)) < 1.02 * lengths.sum()
    assert eval_batches(lengths, 1) == [[i] for i in range(2000)]  # the order of the file


def test_bucketed_padding_gives_the_scores_of_fixed_padding(backbone, tiny_data, tmp_path):
    tokenizer, model = tiny_tokenizer(backbone), tiny_model(backbone, highway_pooling="mean")
    tokenized = tokenize(SST2.read(tiny_data / "SST-2", "dev"), tokenizer, 40)
    bucketed = run_all_exits(model, tokenized, collator(model.config), batch_size=7)
    fixed_collator = collator(model.config, pad_to=40)
    assert fixed_collator(tokenized, [0])["input_ids"].shape == torch.Size([1, 40])
    fixed = run_all_exits(model, tokenized, fixed_collator, batch_size=1)
    np.testing.assert_allclose(bucketed.logits, fixed.logits, atol=1e-5)
