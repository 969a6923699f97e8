"""The flags as data: what each decides, what --help shows, and that records of 0.5 stay comparable."""

from dataclasses import fields, replace

import pytest
from helpers import ROOT

from deebert.experiment.arguments import Arguments, make_parser, parse_args
from deebert.experiment.compatibility import first_difference, first_stage_settings, training_settings
from deebert.experiment.data_arguments import FILES
from deebert.experiment.flags import flag, help_of
from deebert.experiment.training_arguments import RECIPES
from deebert.utils.errors import InputError

# the keys of "settings" in a run.json of 0.5, without those of the data and the launch
FIRST_STAGE_0_5 = [
    "model_name_or_path",
    "task_name",
    "max_seq_length",
    "pad_to_max_length",
    "do_lower_case",
    "per_gpu_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "fp16",
    "bf16",
    "seed",
    "config_name",
    "tokenizer_name",
    "load_best_model_at_end",
]
TRAINING_0_5 = [
    "train_strategy",
    "highway_pooling",
    "highway_learning_rate",
    "highway_epochs",
    "distill",
    "distill_temperature",
    "exit_rule",
    "cache_features",
]
LAUNCH = ["WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"]

# The flags without which nothing can be parsed
REQUIRED = [
    *("--model_type", "bert", "--model_name_or_path", "m", "--task_name", "SST-2"),
    *("--output_dir", "o", "--data_dir", "d"),
]


@pytest.fixture
def args(tiny_data) -> Arguments:
    flags = (
        f"--model_type bert --model_name_or_path m --task_name SST-2 --output_dir o --data_dir {tiny_data / 'SST-2'}"
    )
    return parse_args(flags.split())


@pytest.mark.parametrize("field", fields(Arguments), ids=lambda field: field.name)
def test_every_flag_declares_what_it_decides_and_shows_one_default(field):
    assert field.metadata["decides"] in ("first_stage", "training", None)
    assert field.metadata["only_with"] in (None, *(other.name for other in fields(Arguments)))
    text = help_of(field)
    assert text.count("(default: ") + text.count("(required)") == 1
    assert text.endswith(")")
    assert "default: None" not in text


def test_a_flag_that_does_not_declare_what_it_decides_cannot_be_defined():
    with pytest.raises(TypeError, match="decides"):
        flag("a new flag", default=0)


def test_help_is_grouped():
    text = make_parser().format_help()
    titles = ["Run: ", "Model: ", "Data: ", "Own data: ", "Training: ", "Logging and checkpoints: ", "Evaluation: "]
    assert [text.index(f"\n{title}") for title in titles] == sorted(text.index(f"\n{title}") for title in titles)
    options = text[text.index("Run: ") :]
    assert options.count("(default: ") + options.count("(default:\n") + options.count("(required)") == len(
        fields(Arguments)
    )


def test_arguments_cannot_be_changed(args):
    with pytest.raises(AttributeError):
        args.seed = 1
    assert replace(args, exit_threshold=[0.1]).exit_threshold == [0.1]
    assert args.exit_threshold == [-1.0]


def test_the_original_name_of_the_threshold(args):
    assert parse_args([*REQUIRED, "--early_exit_entropy", "0.1", "2"]).exit_threshold == [0.1, 2.0]
    assert parse_args([*REQUIRED, "--distill"]).distill == 0.5
    with pytest.raises(InputError, match="argument --exit_threshold/--early_exit_entropy: invalid float value: 'x'"):
        parse_args([*REQUIRED, "--exit_threshold", "x"])


def test_negative_numbers_of_every_spelling_are_values():
    spelled = ["-1", "-.5", "-1e-3", "-inf", "-Infinity"]
    assert parse_args([*REQUIRED, "--exit_threshold", *spelled]).exit_threshold == [float(x) for x in spelled]
    assert parse_args([*REQUIRED, "--weight_decay", "0.00"]).weight_decay == 0
    with pytest.raises(InputError, match="--weight_decay: -1 is not a number from 0"):
        parse_args([*REQUIRED, "--weight_decay", "-1"])


def test_records_of_0_5_stay_comparable(args):
    assert {*first_stage_settings(args)} == {*FIRST_STAGE_0_5, *LAUNCH, "train.tsv"}
    settings = training_settings(args)
    new = {*settings} - {*FIRST_STAGE_0_5, *TRAINING_0_5, *LAUNCH, "train.tsv"}
    assert new == {"highway_head", "exit_before_first_layer", "teacher"}
    recorded = {name: value for name, value in settings.items() if name not in new}  # 0.5 did not record these flags
    assert first_difference(recorded, settings) is None
    linear = training_settings(replace(args, highway_head="linear"))
    assert first_difference(recorded, linear) == "highway_head, None; this run has linear"
    best = replace(args, load_best_model_at_end=True)  # then the dev set decides, and when it is scored
    assert {*training_settings(best)} - {*training_settings(args)} == {"logging_steps", "dev.tsv"}


def test_a_recipe_sets_defaults_and_flags_win():
    paper = parse_args(REQUIRED)
    assert (paper.highway_head, paper.highway_pooling, paper.cache_features) == (None, None, False)
    fast = parse_args([*REQUIRED, "--recipe", "fast", "--highway_epochs", "2"])
    assert (fast.highway_head, fast.highway_pooling, fast.cache_features) == ("linear", "mean", True)
    assert (fast.highway_learning_rate, fast.highway_epochs) == (5e-3, 2.0)
    assert not parse_args([*REQUIRED, "--recipe", "fast", "--train_strategy", "joint"]).cache_features  # no use of it
    assert not parse_args([*REQUIRED, "--recipe", "fast", "--no-cache_features"]).cache_features
    mixed = ["--recipe", "fast", "--train_strategy", "mixed"]  # six epochs are for off-ramps alone
    assert parse_args([*REQUIRED, *mixed]).highway_epochs is None
    assert parse_args([*REQUIRED, *mixed, "--highway_epochs", "3"]).highway_epochs == 3.0


def test_an_evaluation_cuts_texts_as_the_training_did(tmp_path):
    (tmp_path / "config.json").write_text('{"max_seq_length": 96}')
    folder = [*REQUIRED, "--output_dir", str(tmp_path)]
    assert parse_args([*folder, "--do_eval"]).max_seq_length == 96
    assert parse_args([*folder, "--do_eval", "--max_seq_length", "64"]).max_seq_length == 64
    assert parse_args([*folder, "--do_train", "--do_eval"]).max_seq_length == 128
    (tmp_path / "config.json").write_text("{}")  # of a version that did not keep it
    assert parse_args([*folder, "--do_eval"]).max_seq_length == 128


def test_a_recipe_may_set_the_exit_before_the_first_layer(monkeypatch):
    monkeypatch.setitem(RECIPES, "fast", RECIPES["fast"] | {"exit_before_first_layer": True})
    fast = [*REQUIRED, "--recipe", "fast"]
    assert parse_args(fast).exit_before_first_layer is True
    assert parse_args([*fast, "--no-exit_before_first_layer"]).exit_before_first_layer is False
    assert parse_args([*fast, "--highway_pooling", "first"]).exit_before_first_layer is None


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Arguments) if field.name not in ("task_name", "data_dir", *FILES)]
)
def test_only_flags_that_decide_something_make_a_difference(args, name):
    other = replace(args, **{name: "another value"})
    field = next(field for field in fields(Arguments) if field.name == name)
    for settings, results in (
        (first_stage_settings, {"first_stage"}),
        (training_settings, {"first_stage", "training"}),
    ):
        decides = field.metadata["decides"] in results and field.metadata["only_with"] is None
        assert (first_difference(settings(args), settings(other)) is not None) == decides


def test_every_flag_of_the_scripts_exists():
    known = {name for action in make_parser()._actions for name in action.option_strings}
    for script in ("train_deebert.sh", "eval_deebert.sh", "entropy_eval.sh"):
        text = (ROOT / "scripts" / script).read_text()
        used = {
            word for line in text.splitlines() if not line.startswith("#") for word in line.split() if word[:2] == "--"
        }
        assert used <= known, script
