"""The frontier in time: thresholds are scored where they were not chosen, times are ratios of sums, all is there."""

import json

import frontier
import numpy as np
import pandas as pd
import pytest
import static_models
import torch
from frontier_contenders import EARLY, FP32, FULL, PYTORCH, STATIC, Contender, spread
from frontier_tables import Measured, Run, cells
from full_graphs import CHOSEN, same_logits, stock_model, strongest_graphs, timed_turns
from support.exported import parts_kept_in
from support.tiny import random_batch, tiny_model
from transformers import BertConfig, BertForSequenceClassification

from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits
from deebert.modeling.checkpoints import load_config
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils import cli
from deebert.utils.errors import InputError

SST2, TEXTS = TASKS["SST-2"], 40
ODD, EVEN = np.arange(TEXTS) % 2 == 1, np.arange(TEXTS) % 2 == 0


def contender(kind: str, threshold: float | None = None) -> Contender:
    return Contender(kind, "m", FP32, lambda texts: np.zeros(len(texts), int), threshold)


def measured(wrong: list[np.ndarray], seconds: list[np.ndarray], kinds: list[str]) -> Measured:
    """The label is 0, and contenders are wrong on some texts (S,). Odd texts are one half; batches are single texts."""
    found = [contender(kind, float(i) if kind == EARLY else None) for i, kind in enumerate(kinds)]
    batches = {1: [np.array([i]) for i in range(TEXTS)]}
    return Measured(SST2, found, np.array(wrong, int), np.zeros(TEXTS, int), 1 * ODD, batches, {1: np.array(seconds)})


def test_a_threshold_is_scored_on_the_other_half():
    some = np.arange(TEXTS) < 8  # 4 of each half
    one, two = np.full(TEXTS, 1.0), np.full(TEXTS, 2.0)
    # the first is right on odd texts only, the second on even ones only; the third is slower, and wrong as the rival is
    result = measured([EVEN, ODD, some, some], [one, one, two, 3 * two], [EARLY, EARLY, EARLY, STATIC])
    early = result.choose("m", FP32, 1, result.predicted[3])
    assert early.thresholds == (0.0, 1.0)  # for even texts the one that is right on the odd ones, and so on
    assert early.predicted.all()
    assert early.seconds.tolist() == one.tolist()
    assert cells(result, "m", FP32, 1, rival=3) == "6.00 (6.00 to 6.00), -80.0"

    result.predicted[:2] = some  # of equal ones the fastest
    result.seconds[1][1] = np.where(ODD, 0.5, 1.5)
    assert result.choose("m", FP32, 1, result.predicted[3]).thresholds == (1.0, 0.0)
    perfect = np.zeros(TEXTS, int)
    assert result.choose("m", FP32, 1, perfect) is None
    assert result.choose("m", FP32, 1, perfect, lost=0.2).thresholds == (1.0, 0.0)


def test_times_are_ratios_of_sums_with_intervals_over_the_batches():
    result = measured([EVEN], [np.ones(TEXTS)], [EARLY])
    rng = np.random.default_rng(1)
    fast, slow = rng.uniform(1, 2, TEXTS), rng.uniform(2, 4, TEXTS)
    ratios = result.times_as_fast(Run(EVEN, fast), Run(EVEN, slow))
    assert ratios[0] == pytest.approx(slow.sum() / fast.sum())
    spread_of_ratio = np.std(slow - ratios[0] * fast) / np.sqrt(TEXTS) / fast.mean()
    assert ratios[1:].std() == pytest.approx(spread_of_ratio, rel=0.15)
    assert np.ptp(result.times_as_fast(Run(EVEN, fast), Run(EVEN, 2 * fast))) < 1e-9  # paired


def test_batches_are_of_one_half_and_hold_each_timed_text_once():
    texts = [("a" * (i % 7),) for i in range(100)]
    half, batches = frontier.divide(texts, 70)
    assert np.bincount(half).tolist() == [50, 50]
    for size, some in batches.items():
        assert sorted(np.concatenate(some).tolist()) == sorted(np.concatenate(batches[1]).tolist())
        assert len(np.unique(np.concatenate(some))) == 70
        assert max(map(len, some)) == size
        assert all(len(set(half[rows])) == 1 for rows in some)


def test_turns_give_the_median_of_each_function_on_each_input(monkeypatch):
    clock, calls = [0.0], []

    def work(seconds: float, given: int) -> None:
        clock[0] += seconds * given
        calls.append(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    seconds = timed_turns([lambda x: work(1, x), lambda x: work(3, x)], [1, 2, 4], rounds=3, turn=2)
    np.testing.assert_allclose(seconds, [[1, 2, 4], [3, 6, 12]])
    assert len(calls) == 2 * 3 * (3 + 2)  # each turn begins with one call that is not timed
    assert calls != sorted(calls)


def test_thresholds_save_in_equal_steps():
    rng = np.random.default_rng(0)
    exits = AllExits(rng.normal(size=(300, 6, 2), scale=2).astype(np.float32), rng.integers(2, size=300))
    thresholds = spread(exits, 5)
    saved = [1 - exits.cost(exits.exit_layers(x), x) for x in thresholds]
    np.testing.assert_allclose(saved, np.linspace(0, saved[-1], 6)[1:], atol=0.05)


def tiny_static(folder, config) -> BertConfig:
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "id2label")
    fitting = BertConfig(num_hidden_layers=1, **{name: getattr(config, name) for name in names})
    static_models.MeanPooledForSequenceClassification(fitting).save_pretrained(folder)


def test_a_graph_with_other_logits_is_noticed(tmp_path, capsys):
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    model, other = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config).eval()
    ids = np.arange(4, 10)[None]
    batches = {1: [{"input_ids": ids, "attention_mask": np.ones_like(ids)}]}
    graphs = strongest_graphs(model, batches, tmp_path)
    assert {path for paths in graphs.values() for path in paths.values()} | {tmp_path / CHOSEN} == {*tmp_path.iterdir()}
    assert same_logits(model, graphs["fp32"][1], batches)
    assert not same_logits(other, graphs["fp32"][1], batches)
    assert "gives other logits than the model" in capsys.readouterr().out


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_the_full_model_in_pytorch_gives_our_full_models_logits(tmp_path, backbone, pooling):
    model = tiny_model(backbone, classifier_pooling=pooling)
    model.save_pretrained(tmp_path)
    batch = random_batch(model.config, [4, 9, 12])
    with torch.no_grad():
        expected = model(**batch, exit_threshold=NO_EXIT).logits
        torch.testing.assert_close(stock_model(str(tmp_path), model)(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_everything_on_one_page(tmp_path, tiny_data, tiny_checkpoints, small_exports, monkeypatch, capsys):
    model = small_exports / "model"
    tiny_static(tmp_path / "static", load_config(str(model)))
    for file in model.glob("tokenizer*"):
        (tmp_path / "static" / file.name).write_bytes(file.read_bytes())
    argv = (
        f"frontier.py --frontier_dir {tmp_path}/out --models tiny={model} --static tiny-1={tmp_path}/static --texts 12"
    )
    argv += f" --encoders tiny={tiny_checkpoints['bert']} --rounds 1 --task_name SST-2 --data_dir {tiny_data}/SST-2"

    def run(*more: str) -> str:
        monkeypatch.setattr("sys.argv", [*argv.split(), *more])
        with parts_kept_in(small_exports / "parts"):
            frontier.main()
        return capsys.readouterr().out

    printed, page = run(), (tmp_path / "out/frontier.md").read_text()
    assert "exports, and one pass" in printed
    assert "scored early exit, tiny, PyTorch at -1" in printed
    lines = pd.read_csv(tmp_path / "out/frontier.csv", keep_default_na=False)
    counts = lines.groupby(["kind", "runtime"]).size().to_dict()
    assert counts[FULL, PYTORCH] == counts[STATIC, FP32] == counts["TF-IDF", "other"] == 2  # sizes of a batch
    assert counts[EARLY, PYTORCH] == counts[EARLY, FP32] == counts[EARLY, "ONNX int8"] > 4
    exact = lines[lines.runtime != "ONNX int8"]
    assert (exact[exact.kind == EARLY].groupby(["threshold", "batch"]).score.nunique() == 1).all()
    never = exact[(exact.kind == EARLY) & (exact.threshold == "-1.0")].score
    assert {*never} == {*exact[exact.kind == FULL].score}
    assert (lines.ms_low <= lines.ms).all()
    assert lines.ms_low.min() > 0
    for rival in ("TF-IDF", "smaller model, tiny-1", "frozen encoder, tiny"):
        assert f"\n| {rival} | " in page
    assert (tmp_path / "out/frontier.png").read_bytes()[:4] == b"\x89PNG"

    again = run()
    assert "exports, and one pass" not in again
    assert "scored early exit" not in again
    with pytest.raises(InputError, match="made of other models, or of other data"):
        run("--max_seq_length", "20")
    assert json.loads((tmp_path / "out/work/made_of.json").read_text())["flags"][0] == "--task_name"


def test_bad_input_gets_one_line(tmp_path, small_exports, tiny_data, monkeypatch):
    for models, message in (("tiny", "tiny is not NAME=FOLDER"), (f"tiny={tmp_path}", "is not NAME=FOLDER")):
        monkeypatch.setattr("sys.argv", ["frontier.py", "--frontier_dir", str(tmp_path / "out"), "--models", models])
        with pytest.raises(cli.InputError, match=message):
            frontier.main()


def test_the_test_file_of_own_data_is_scored(tmp_path):
    tiny_model("bert", num_labels=3, id2label={0: "bad", 1: "good", 2: "odd"}).save_pretrained(tmp_path / "model")
    for name, number in (("train", 30), ("test", 4)):
        lines = [f"text {i} of {name},{('odd', 'good', 'bad')[i % 3]}" for i in range(number)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    files = [f"--{name}_file={tmp_path}/{name}.csv" for name in ("train", "test")]
    task, train, scored = frontier.read_task([("m", str(tmp_path / "model"))], files)
    assert [task.labels[example.label] for example in scored] == ["odd", "good", "bad", "odd"]
    assert len(train) == 27  # a tenth is the dev set, on which the models' thresholds may have been chosen
