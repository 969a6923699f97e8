"""The flags as data: what --help shows, what a wrong one says, and which of them decide a training."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from support.helpers import ROOT

from deebert.data.tasks import get_task
from deebert.experiment.arguments import EVALUATED, Arguments, make_parser, parse_args
from deebert.experiment.earlier_run import FREE, first_difference, training_settings
from deebert.training.strategies import RECIPES, TrainSettings
from deebert.utils.errors import InputError

# the original's flags, all of them with a value that is not their default
ORIGINAL = """
    --data_dir d --model_type bert --model_name_or_path m --task_name SST-2 --output_dir o --plot_data_dir p
    --config_name c --tokenizer_name t --cache_dir h --max_seq_length 64 --do_train --do_eval
    --evaluate_during_training --do_lower_case --eval_each_highway --eval_after_first_stage --eval_highway
    --per_gpu_train_batch_size 2 --per_gpu_eval_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 1e-4
    --weight_decay 0.1 --adam_epsilon 1e-6 --max_grad_norm 2 --num_train_epochs 2 --max_steps 7 --warmup_steps 1
    --early_exit_entropy 0.1 --logging_steps 5 --save_steps 5 --eval_all_checkpoints --no_cuda
    --overwrite_output_dir --overwrite_cache --seed 1 --fp16
"""
ORIGINAL = ORIGINAL.split()
REQUIRED = ["--do_train", "--do_eval", "--model_name_or_path", "m", "--output_dir", "o"]
REQUIRED += ["--task_name", "SST-2", "--data_dir", "d"]


@pytest.fixture
def args(tiny_data) -> Arguments:
    return parse_args([*REQUIRED, "--data_dir", str(tiny_data / "SST-2")])


def flags() -> list:
    """The parser's flags, without --help."""
    return make_parser()._actions[1:]


def test_the_flags_of_the_original_are_here_and_few_others():
    given = parse_args(ORIGINAL).as_dict()
    defaults = {flag.dest: flag.default for flag in flags()}
    assert {name for name, value in given.items() if value != defaults[name]} >= {
        name[2:] for name in ORIGINAL if name.startswith("--") and name != "--early_exit_entropy"
    }
    assert given["exit_threshold"] == [0.1]
    assert len(flags()) <= 60


def test_the_defaults_of_the_original():
    args = parse_args(REQUIRED)
    assert args.training == TrainSettings()
    expected = {"plot_data_dir": "./plotting/", "exit_threshold": [-1.0], "per_gpu_eval_batch_size": 8, "fp16": False}
    assert args.as_dict() | expected == args.as_dict()


def test_help_is_grouped_and_shows_defaults():
    text = " ".join(make_parser().format_help().split())
    titles = ["Run: ", "Model: ", "Data: ", "Own data: ", "Training: ", "Checkpoints: ", "Evaluation: "]
    assert [text.index(f" {title}") for title in titles] == sorted(text.index(f" {title}") for title in titles)
    assert "peak of the linear schedule (default: 5e-05)" in text
    assert "biases and LayerNorm weights have none (default: 0.0)" in text
    assert "--max-seq-length" not in text
    assert all(flag.help for flag in flags())


def test_a_wrong_flag_is_named_before_anything_slow_is_imported():
    code = "import sys, run_glue_deebert as r\ntry: r.main(['--output_dir', 'o', '--seeds', '3'])\n"
    code += "except ValueError as error: print('torch' in sys.modules, error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False unrecognized arguments: --seeds 3 (")


def test_arguments_cannot_be_changed(args):
    with pytest.raises(AttributeError):
        args.training.seed = 1


def test_the_original_name_of_the_threshold():
    assert parse_args([*REQUIRED, "--early_exit_entropy", "0.1", "2"]).evaluation.exit_threshold == [0.1, 2.0]
    assert parse_args([*REQUIRED, "--distill"]).training.distill == 0.5
    with pytest.raises(InputError, match="--early_exit_entropy: invalid float value: 'x'"):
        parse_args([*REQUIRED, "--exit_threshold", "x"])


def test_negative_numbers_of_every_spelling_are_values():
    spelled = ["-1", "-.5", "-1e-3", "-inf", "-Infinity"]
    given = parse_args([*REQUIRED, "--exit_threshold", *spelled]).evaluation.exit_threshold
    assert given == [float(x) for x in spelled]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--weight_decay -1", "--weight_decay -1.0: give a number from 0"),
        ("--per_gpu_eval_batch_size 0", "--per_gpu_eval_batch_size 0: give a number from 1"),
        ("--validation_split 0.7", "--validation_split 0.7: give a number above 0 up to 0.5"),
        ("--target_drop 1", "--target_drop 1.0: give a number above 0 up to 0.999"),
        ("--target_drop 0.01 --risk 0.05", "--risk and --target_drop: a threshold is chosen for one of them"),
        ("--warmup_steps 1.5", "invalid int value: '1.5'"),
        ("--train_strategy three_stage", "invalid choice: 'three_stage'"),
        ("--do_train maybe", "Truthy value expected"),
        ("--label_column x", "--label_column has no effect without --train_file or --validation_file or"),
        ("--train_file a.csv", "--task_name and --data_dir are for GLUE's files"),
        ("--evaluate_during_training --logging_steps 0", "it scores every --logging_steps, and that is 0"),
        ("--output_dir .", "--output_dir .: give a folder's name"),
    ],
)
def test_a_wrong_value_gets_one_line(more, message):
    with pytest.raises(InputError) as error:
        parse_args([*REQUIRED, *more.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVALUATED)
def test_a_flag_without_effect_is_a_mistake(name):
    value = [] if name.startswith("eval") else ["0.1"]
    train = [flag for flag in REQUIRED if flag != "--do_eval"]
    with pytest.raises(InputError, match=f"--{name} has no effect without --do_eval: add it, or leave --{name} out"):
        parse_args([*train, f"--{name}", *value])
    assert vars(parse_args([*REQUIRED, f"--{name}", *value]).evaluation)[name]


def test_a_run_needs_work_and_a_model_to_start_from():
    with pytest.raises(InputError, match="nothing to do: give --do_train or --do_eval"):
        parse_args(["--output_dir", "o"])
    with pytest.raises(InputError, match="--do_train needs --model_name_or_path"):
        parse_args(["--output_dir", "o", "--do_train"])
    assert parse_args(["--output_dir", "o", "--do_eval"]).model.model_name_or_path == "o"  # the name of its results


def test_a_recipe_sets_what_is_not_given():
    paper, fast = parse_args(REQUIRED), parse_args([*REQUIRED, "--recipe", "fast"])
    assert (paper.model.recipe, paper.model.off_ramps()) == ("paper", {})
    assert paper.stage_settings(2, 384) == paper.training
    assert fast.model.off_ramps() == RECIPES["fast"].off_ramps
    assert [fast.stage_settings(stage, 384).num_train_epochs for stage in (1, 2)] == [4, 6]
    rates = ("learning_rate", "head_learning_rate", "highway_learning_rate")
    for width, expected in ((128, [1e-4, 1e-3, 5e-3]), (384, [1e-4, 1e-3, 5e-3]), (768, [5e-5, 5e-4, 5e-3])):
        assert [getattr(fast.stage_settings(1, width), rate) for rate in rates] == expected
    one = parse_args([*REQUIRED, "--recipe", "fast", "--learning_rate", "2e-5"]).stage_settings(1, 768)
    assert [getattr(one, rate) for rate in rates] == [2e-5, 5e-4, 5e-3]
    given = parse_args([*REQUIRED, "--recipe", "fast", "--highway_learning_rate", "1e-3", "--highway_pooling", "first"])
    assert given.stage_settings(2, 384).highway_learning_rate == 1e-3
    assert given.model.off_ramps()["exit_before_first_layer"] is False  # the first token's embedding is no feature
    mixed = parse_args([*REQUIRED, "--recipe", "fast", "--train_strategy", "mixed"])
    assert mixed.stage_settings(2, 384).num_train_epochs == 4  # six epochs are for off-ramps alone


def test_the_best_epoch_counts_where_the_dev_set_is_no_benchmarks():
    """On GLUE's dev sets the scores are reported, so that they choose nothing unless it is wanted."""
    own = ["--do_train", "--model_name_or_path", "m", "--output_dir", "o", "--train_file", "a.csv"]
    assert parse_args(own).checkpoints.load_best_model_at_end
    assert not parse_args([*own, "--load_best_model_at_end", "false"]).checkpoints.load_best_model_at_end
    assert not parse_args([*own, "--recipe", "paper"]).checkpoints.load_best_model_at_end
    assert not parse_args([*REQUIRED, "--recipe", "fast"]).checkpoints.load_best_model_at_end


def test_all_flags_but_a_few_decide_a_training(args):
    """Those without influence are named; the others end a training with another value."""
    settings = training_settings(args, get_task("SST-2"))
    evaluation = {field.name for field in fields(args.evaluation)}
    assert {*args.as_dict()} - {*settings} == FREE | evaluation
    assert {*settings} - {*args.as_dict()} == {"train.tsv", "processes", "mixed_precision"}
    assert first_difference(json.loads(json.dumps(settings)), settings) is None
    other = training_settings(replace(args, training=replace(args.training, seed=1)), get_task("SST-2"))
    assert first_difference(settings, other) == "seed, 42; this run has 1"
    best = replace(args.checkpoints, evaluate_during_training=True, load_best_model_at_end=True)
    assert "dev.tsv" in training_settings(replace(args, checkpoints=best), get_task("SST-2"))


def test_groups_share_no_name():
    names = [field.name for group in fields(Arguments) for field in fields(group.type)]
    assert len(names) == len(set(names)) == len(flags())


def test_every_flag_of_the_scripts_exists():
    known = {name for flag in flags() for name in flag.option_strings}
    for script in ("train_deebert.sh", "eval_deebert.sh", "entropy_eval.sh"):
        text = (ROOT / "scripts" / script).read_text()
        used = {
            word for line in text.splitlines() if not line.startswith("#") for word in line.split() if word[:2] == "--"
        }
        assert used <= known, script
