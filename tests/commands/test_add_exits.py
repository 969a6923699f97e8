"""Off-ramps for a classifier that is fine-tuned already: it stays as it is, and keeps its promise without labels."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binom
from support.helpers import ROOT, simulated, snapshot_files, with_costs
from support.tiny import sentences, tiny_model, tiny_tokenizer

import deebert
from deebert import __main__
from deebert.data.tasks import TASKS
from deebert.evaluation.threshold_selection import SelectionTarget
from deebert.experiment import add_exits as module
from deebert.experiment.arguments import parse_args
from deebert.experiment.run import run
from deebert.modeling.backbones import NAMES
from deebert.modeling.checkpoints import save_model
from deebert.modeling.exit_rules import NO_EXIT, entropy
from deebert.modeling.off_ramps import is_off_ramp
from deebert.utils import cli
from deebert.utils.errors import InputError

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 66, "initializer_range": 0.2}
LABELS = {0: "ja", 1: "nein: gar nicht", 2: "weiß nicht"}
TEXTS = list(dict.fromkeys(text for text, _ in sentences(400, seed=3)))[:240]
HELD_OUT = 48  # of TEXTS, at an agreement of 0.9, which needs 29


def stock_class(model_type: str) -> type:
    return getattr(transformers, f"{NAMES[model_type].removeprefix('Dee')}ForSequenceClassification")


def save_stock(folder, model_type: str = "bert", **options):
    """A classifier as Hugging Face's class saves it, with its tokenizer."""
    padding = 1 if model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    model_class = stock_class(model_type)
    torch.manual_seed(1)
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    sizes = {"pad_token_id": padding, "hidden_dim": 48} | SIZES  # hidden_dim: DistilBERT's intermediate_size
    if model_type == "distilbert":
        del sizes["intermediate_size"]
    model = model_class(model_class.config_class(**sizes | labels | options)).eval()
    tokenizer = tiny_tokenizer("roberta" if padding else "bert")
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():  # each label is as likely as another
        (last,) = (part for part in model.modules() if getattr(part, "out_features", None) == model.num_labels)
        last.bias -= model(**inputs).logits.mean(dim=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def classifier(tmp_path):
    save_stock(tmp_path / "mine")
    return tmp_path / "mine"


def predicted(folder, texts: list[str]) -> list[str]:
    """The labels that Hugging Face's own class gives."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = stock_class(json.loads((folder / "config.json").read_text())["model_type"]).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return [model.config.id2label[int(each.argmax())] for each in logits]


def command(monkeypatch, *flags) -> None:
    monkeypatch.setattr("sys.argv", ["deebert", "add-exits", *map(str, flags)])
    __main__.main()


@pytest.mark.parametrize("model_type", NAMES)
def test_the_classifier_stays_bit_for_bit(model_type, tmp_path):
    stock = save_stock(tmp_path / "mine", model_type)
    before = snapshot_files(tmp_path / "mine")
    added = deebert.add_exits(tmp_path / "mine", TEXTS, tmp_path / "fast", agreement=0.8, say=lambda line: None)
    assert list(added.agreement) == [0, 1, 2]
    assert snapshot_files(tmp_path / "mine") == before

    again, info = stock_class(model_type).from_pretrained(tmp_path / "fast", output_loading_info=True)
    assert not info["missing_keys"]
    heads = ("classifier.", "roberta.pooler.")  # RoBERTa's own head has other names here
    assert all(is_off_ramp(name) or name.startswith(heads) for name in info["unexpected_keys"])
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("mine", "fast"))
    batch = before(TEXTS[:20], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        logits = stock(**batch).logits
        assert torch.equal(again.eval()(**batch).logits, logits)
        ours = getattr(deebert, f"{NAMES[model_type]}ForSequenceClassification").from_pretrained(tmp_path / "fast")
        plain = ours.eval()(**batch, exit_threshold=NO_EXIT, output_hidden_states=True).logits  # all tokens to the end
    assert torch.equal(plain, logits)
    weights = ours.state_dict()
    taken = {name: value for name, value in stock.state_dict().items() if name in weights}
    assert len(taken) == len(stock.state_dict()) - 4 * (model_type == "roberta")
    assert all(torch.equal(weights[name], value) for name, value in taken.items())

    assert ours.config.id2label == LABELS
    assert ours.config.problem_type == stock.config.problem_type
    assert after(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    assert ours.config.max_seq_length == after.model_max_length == before.model_max_length


def test_the_held_out_texts_keep_their_labels_as_it_says(classifier, tmp_path):
    said = []
    added = deebert.add_exits(classifier, TEXTS + TEXTS[:50], tmp_path / "fast", agreement=0.9, say=said.append)
    held_out = [TEXTS[row] for row in np.random.default_rng(42).permutation(len(TEXTS))[:HELD_OUT]]
    full = predicted(classifier, held_out)
    assert len(set(full)) > 1
    early = deebert.Classifier(str(tmp_path / "fast"))(held_out)
    same = [prediction.label == label for prediction, label in zip(early, full, strict=True)]
    assert added.threshold > 0
    assert added.kept == pytest.approx(np.mean(same))
    assert 0 < added.cost < 1
    assert {prediction.exit_layer for prediction in early} > {3}
    assert any(f"{100 * added.kept:.2f} % of the held-out texts keep their label" in line for line in said)
    assert f"192 different texts train the off-ramps, {HELD_OUT} are held out" in said
    card = (tmp_path / "fast/README.md").read_text(encoding="utf-8")
    promise = f"the predictions of mine at {100 * added.cost:.0f} % of its cost; with 95 % confidence 90 % of unseen"
    assert promise in said[-1]
    assert promise in card


def test_the_threshold_is_the_last_that_the_exact_test_shows():
    """Whatever the labels are: the classifier's own predictions take their place."""
    exits = with_costs(simulated(800, seed=1))
    added = module.measure(TASKS["SST-2"], exits, SelectionTarget(risk=0.05), seed=0)
    full, uncertainty = exits.logits[:, -1].argmax(-1), entropy(torch.from_numpy(exits.logits[:, :-1])).numpy()
    kept = {}
    for threshold in [round(np.log(2) * i / 200, 4) for i in range(1, 201)]:
        below = uncertainty < threshold
        exit_at = np.where(below.any(axis=1), below.argmax(axis=1), exits.num_exits - 1)
        same = exits.logits[np.arange(800), exit_at].argmax(-1) == full
        if binom.cdf((~same).sum(), 800, 0.05) > 0.05:
            break
        kept[threshold] = same.mean()
    assert len(kept) > 10
    assert added.threshold == max(kept)
    assert added.kept == pytest.approx(kept[max(kept)])
    assert added.cost == pytest.approx(exits.cost(exits.exit_layers(added.threshold), added.threshold))
    assert added.agreement[2] == pytest.approx((exits.logits[:, 1].argmax(-1) == full).mean())


def test_a_wrong_flag_is_named_before_anything_slow_is_imported():
    code = "import sys\nfrom deebert.commands.add_exits import main\nsys.argv[1:] = ['--texts', 'x']\n"
    code += "try: main()\nexcept ValueError as error: print('torch' in sys.modules, error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False the following arguments are required: --model, --file, --output")


def test_lines_of_a_text_file_by_the_command(classifier, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    files = ("--model", classifier, "--file", tmp_path / "texts.txt", "--output", tmp_path / "fast")
    command(monkeypatch, *files, "--agreement", "0.9")
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "fast/config.json").read_text())["exit_threshold"]
    assert float(out.split("chosen threshold: ")[1].split(" nats")[0]) == stored
    assert "against the file's labels" not in out
    assert f"{tmp_path / 'fast'}: the predictions of mine at" in out


def test_labels_in_a_table_are_scored_and_change_nothing(classifier, tmp_path, monkeypatch, capsys):
    labels = predicted(classifier, TEXTS)
    right = [label if i % 5 else LABELS[0] for i, label in enumerate(labels)]
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, right, strict=True))
    (tmp_path / "named.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    numbers = "".join(f"{text},{i % 3}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "numbers.csv").write_text(f"text,label\n{numbers}")
    (tmp_path / "other.csv").write_text(f"text,label\n{numbers.replace('2', 'spam')}")
    (tmp_path / "none.csv").write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS)))
    chosen, scored = set(), {}
    for name in ("named", "numbers", "other", "none"):
        files = ("--model", classifier, "--file", tmp_path / f"{name}.csv", "--output", tmp_path / name)
        command(monkeypatch, *files, "--agreement", "0.9")
        scored[name] = capsys.readouterr().out
        chosen.add(json.loads((tmp_path / name / "config.json").read_text())["exit_threshold"])
    assert len(chosen) == 1
    held_out = np.random.default_rng(42).permutation(len(TEXTS))[:HELD_OUT]
    early = deebert.Classifier(str(tmp_path / "named"))([TEXTS[row] for row in held_out])
    score = np.mean([each.label == right[row] for each, row in zip(early, held_out, strict=True)])
    full = np.mean([labels[row] == right[row] for row in held_out])
    assert f"against the file's labels: score {100 * score:.2f} % ({100 * (score - full):+.2f})" in scored["named"]
    assert "against the file's labels: score" in scored["numbers"]
    assert "no labels are used: " in scored["other"]
    assert "label 'spam' is unknown" not in scored["none"]
    assert "against the file's labels" not in scored["other"] + scored["none"]
    assert "acc at the stored threshold" in (tmp_path / "named/README.md").read_text(encoding="utf-8")
    assert "acc at the stored threshold" not in (tmp_path / "none/README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is unknown to the training"):
        command(
            monkeypatch,
            *files[:2],
            "--file",
            tmp_path / "other.csv",
            *files[4:-1],
            tmp_path / "x",
            "--label_column",
            "label",
        )
    assert not (tmp_path / "x").exists()


def test_several_labels_have_to_stay_all(tmp_path, monkeypatch, capsys):
    save_stock(tmp_path / "mine", problem_type="multi_label_classification")
    rows = [json.dumps({"text": text, "labels": [LABELS[i % 3]] * (i % 2)}) for i, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    files = ("--model", tmp_path / "mine", "--file", tmp_path / "texts.jsonl", "--output", tmp_path / "fast")
    command(monkeypatch, *files, "--agreement", "0.7")
    assert "against the file's labels: score" in capsys.readouterr().out
    held_out = [TEXTS[row] for row in np.random.default_rng(42).permutation(len(TEXTS))[:HELD_OUT]]
    early, full = (deebert.Classifier(str(tmp_path / "fast"), threshold)(held_out) for threshold in (None, NO_EXIT))
    same = np.mean([a.label == b.label for a, b in zip(early, full, strict=True)])
    assert len({str(prediction.label) for prediction in full}) > 2
    assert same > 0.7
    assert any(prediction.exit_layer < 3 for prediction in early)
    added = deebert.add_exits(tmp_path / "mine", TEXTS, tmp_path / "again", agreement=0.7, say=lambda line: None)
    assert added.kept == pytest.approx(same)


def test_texts_that_are_cut_are_counted(classifier, tmp_path):
    said, texts = [], [*TEXTS, *(f"{text} so" * 30 for text in TEXTS[:60])]
    deebert.add_exits(classifier, texts, tmp_path / "fast", agreement=0.8, max_seq_length=16, say=said.append)
    cut = sum(len(tiny_tokenizer("bert")(text)["input_ids"]) > 16 for text in texts)
    assert 60 <= cut < 100
    shown = int(said[0].split()[1])  # of those that train
    assert 0.6 * cut < shown < cut
    assert "have more than 16 tokens and were cut (max_seq_length)" in said[0]
    assert json.loads((tmp_path / "fast/config.json").read_text())["max_seq_length"] == 16


def test_where_nothing_is_saved_the_exits_are_off(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train_off_ramps", lambda *_: None)  # they know nothing
    said = []
    added = deebert.add_exits(classifier, TEXTS, tmp_path / "fast", agreement=0.95, say=said.append)
    assert (added.threshold, added.kept, added.cost) == (None, 1.0, 1.0)
    assert "by layer, in %: 0: " in said[1]
    assert "no threshold is shown to save anything and to keep, with 95 % confidence, the promise that 95 %" in said[2]
    assert "early exit is switched off (exit_threshold -1)" in said[3]
    predictions = deebert.Classifier(str(tmp_path / "fast"))(TEXTS)
    assert {prediction.exit_layer for prediction in predictions} == {3}
    assert [prediction.label for prediction in predictions] == predicted(classifier, TEXTS)


def test_an_evaluation_reads_the_folder(classifier, tmp_path, capsys):
    deebert.add_exits(classifier, TEXTS, tmp_path / "fast", agreement=0.9, say=lambda line: None)
    labels = predicted(classifier, TEXTS[:60])
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, labels, strict=False))
    (tmp_path / "dev.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    flags = ["--do_eval", "--output_dir", tmp_path / "fast", "--validation_file", tmp_path / "dev.csv"]
    assert run(parse_args([*map(str, flags), "--plot_data_dir", str(tmp_path / "results")]))["acc_"] == 1
    assert "at the model's threshold" in capsys.readouterr().out


def test_an_interrupted_run_leaves_nothing(classifier, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_off_ramps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deebert.add_exits(classifier, TEXTS, tmp_path / "fast", agreement=0.9, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_done_gets_one_line(classifier, tmp_path, monkeypatch):
    def refused(message: str, model=classifier, texts=TEXTS, output=tmp_path / "fast", **options) -> None:
        with pytest.raises(InputError, match=message):
            deebert.add_exits(model, texts, output, **{"agreement": 0.9} | options)
        assert not (tmp_path / "fast").exists()

    refused(
        "120 different texts are too few to show with 95 % confidence that 98 % .* at least 298",
        texts=TEXTS[:120] * 9,
        agreement=0.98,
    )
    refused("agreement 1: give a share", agreement=1)
    refused("agreement 0: give a share", agreement=0)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    refused("ends in one of .csv", texts=tmp_path / "texts.txt", text_column="text")
    refused("no.txt: cannot be read", texts=tmp_path / "no.txt")
    refused("a text is not valid Unicode", texts=[*TEXTS, "\ud83d"])
    refused("texts have to be strings", texts=[*TEXTS, None])
    refused("all items have to be texts, or all of them pairs", texts=[*TEXTS, ("a", "pair")])
    refused("in the folder of the classifier", output=classifier / "fast")
    refused("in the folder of the classifier", output=classifier)
    refused("^max_seq_length 512: this model takes 8 to 66 tokens", max_seq_length=512)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    refused("there is something in it", output=tmp_path / "full")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    refused("there is something in it", output=tmp_path / "full/mine.txt")

    save_stock(tmp_path / "number", num_labels=1, id2label={0: "score"}, label2id={"score": 0})
    refused("it predicts a number", model=tmp_path / "number")
    save_stock(tmp_path / "short", num_hidden_layers=1)
    refused("one layer", model=tmp_path / "short")
    save_model(tiny_model("bert"), tiny_tokenizer("bert"), tmp_path / "dee")
    refused("it has off-ramps already", model=tmp_path / "dee")
    for model_type in ("bert", "roberta"):
        save_stock(tmp_path / model_type, model_type).base_model.save_pretrained(tmp_path / model_type)
        refused("not a fine-tuned classifier, it has no classifier", model=tmp_path / model_type)
    for file in classifier.glob("tokenizer*"):
        file.unlink()
    refused("no tokenizer there")
    monkeypatch.setattr("sys.argv", ["deebert", "add-exits", "--model", "x", "--file", "y"])
    with pytest.raises(SystemExit) as exit_code:
        cli.run(__main__.main)
    assert exit_code.value.code == 2
