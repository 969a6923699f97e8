"""Random models in every runtime against a brute force. `bash scripts/run_tests.sh --fuzz 10000` tries many more.

A case is one comparison: a model, a batch, a rule and a threshold in one runtime. Each example of hypothesis takes some
of the runtimes.
"""

import ast
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support import brute_force
from support.brute_force import STOCK, BruteForce
from support.exported import exports_of_all_workers, model_to_export
from support.fuzz_option import ENCODERS, RUNTIMES
from support.judge import Tally, judge
from support.onnx_runtimes import FP32, INT8, Export
from support.random_cases import (
    SHARES,
    THRESHOLDS,
    Texts,
    Thresholds,
    Weights,
    make_model,
    model_settings,
    rules_of,
    texts,
)
from support.runtimes import PYTORCH, Trial
from support.tiny import tiny_tokenizer

from deebert.modeling.backbones import NAMES
from deebert.runtime import onnx_export

EXPORTED_DEPTHS = (2, 2, 3)  # exports take seconds a layer


@dataclass(frozen=True)
class Case:
    """A batch, thresholds and some runtimes. rule, draw: 0 to 1, which rule, and what runtimes choose themselves."""

    texts: Texts
    thresholds: Thresholds
    rule: float
    draw: float
    runtimes: list[str]


def cases(runtimes: dict[str, Callable], integers_only: bool = False) -> st.SearchStrategy[Case]:
    some = st.lists(st.sampled_from(list(runtimes)), min_size=RUNTIMES, max_size=RUNTIMES, unique=True)
    return st.builds(Case, texts(integers_only), THRESHOLDS, SHARES, SHARES, some)


@st.composite
def models(draw, encoder: str) -> dict:
    """The arguments of `make_model`."""

    def choose(options):
        return draw(st.sampled_from(options))

    dtype, attention = choose(["float32", "float32", "float64", "bfloat16"]), choose(["sdpa", "eager"])
    if encoder == "mpnet":
        attention = "eager"  # the only one that Hugging Face has for it
    if (encoder, dtype) == ("modernbert", "float64"):
        attention = (
            "sdpa"  # Hugging Face's eager one makes float32's -inf of float64's smallest number, and NaN of that
        )
    return {
        "encoder": encoder,
        "settings": model_settings(choose, encoder),
        "weights": Weights.choose(choose, dtype),
        "dtype": dtype,
        "attention": attention,
    }


def compare(case: Case, model, brute: BruteForce, dtype: str, runtimes: dict[str, tuple], tally: Tally) -> None:
    """Runs all of the case's runtimes. runtimes: by name the model, and a function from trial to outcome."""
    batch = case.texts.tensors(model.config)
    reference = brute.all_exits(batch)
    rules = rules_of(model.config)
    rule = rules[int(case.rule * len(rules))]
    for name in case.runtimes:
        own_model, run = runtimes[name]
        threshold = lambda rule: case.thresholds.of(rule, reference)  # noqa: E731
        trial = Trial(own_model, batch, reference, rule, threshold, case.draw)
        with torch.no_grad():
            judge(tally, name, dtype, trial, run(trial))


def explore(strategy: st.SearchStrategy, check: Callable, number: int, examples: int, record_property) -> None:
    """Runs check(example, tally) on that many examples of a strategy; the number says which."""
    tally = Tally()

    @seed(number)
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(example):
        check(example, tally)

    run()
    record_property("fuzz", tally.as_json())


def test_pytorch(fuzz_part, record_property):
    encoder, number, examples = fuzz_part

    def check(example, tally: Tally) -> None:
        made, case = example
        model = make_model(**made)
        exact = torch.bfloat16 if made["dtype"] == "bfloat16" else torch.float64
        brute = BruteForce(model.config.to_dict(), model.state_dict(), exact)
        runtimes = {name: (model, run) for name, run in PYTORCH.items()}
        compare(case, model, brute, made["dtype"], runtimes, tally)

    strategy = st.tuples(models(encoder), cases(PYTORCH))
    explore(strategy, check, zlib.crc32(f"{encoder} {number}".encode()), examples, record_property)


@pytest.fixture
def fuzz_export(fuzz_graph, tmp_path, tmp_path_factory):
    """A model, and the folders of its export with weights of 32 and of 8 bits."""
    encoder, number, _ = fuzz_graph
    folders = {precision: tmp_path / precision for precision in ("fp32", "int8")}
    if number < 0:
        model, shared = model_to_export(encoder), exports_of_all_workers(tmp_path_factory)[encoder]
        folders["fp32"] = shared / "export"
        onnx_export.write_export(shared / "parts", model.config, tiny_tokenizer(encoder), folders["int8"], int8=True)
        return model, folders
    choose = random.Random(number).choice
    model = make_model(encoder, model_settings(choose, encoder, EXPORTED_DEPTHS), Weights.choose(choose))
    with onnx_export.traced_parts(model) as parts:
        for precision, folder in folders.items():
            onnx_export.write_export(parts, model.config, tiny_tokenizer("bert"), folder, precision == "int8")
    return model, folders


@pytest.mark.slow
def test_onnx(fuzz_graph, fuzz_export, record_property):
    encoder, number, examples = fuzz_graph
    model, exports = fuzz_export
    brute = BruteForce(model.config.to_dict(), model.state_dict(), torch.float64)
    runtimes = {}
    for precision, functions in (("fp32", FP32), ("int8", INT8)):
        export = Export(exports[precision])
        for name, run in functions.items():
            runtimes[name] = export.runtime, (lambda trial, run=run, export=export: run(trial, export))

    def check(case: Case, tally: Tally) -> None:
        compare(case, model, brute, "float32", runtimes, tally)

    explore(
        cases(runtimes, integers_only=True),
        check,
        zlib.crc32(f"{encoder} {number}".encode()),
        examples,
        record_property,
    )


def test_the_brute_force_shares_no_code_with_the_package():
    tree = ast.parse(Path(brute_force.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    actual = {name.split(".")[0] for name in modules}
    assert actual == {"collections", "dataclasses", "math", "numpy", "torch", "transformers"}


def test_every_encoder_is_tried():
    assert set(ENCODERS) == set(STOCK) == set(NAMES)
