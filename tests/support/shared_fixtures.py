"""Fixtures of all tests."""

import functools
import gc
from pathlib import Path

import hypothesis
import pytest
import torch
from support.exported import make_small_exports
from support.helpers import once_for_all_workers
from support.tiny import BACKBONES, sentences, tiny_model, tiny_tokenizer

from deebert.evaluation import plotting

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)  # the machines are shared and noisy
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=BACKBONES)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators():
    """torch.onnx makes its table of operators again for each graph: half of the time that a tiny graph takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module", autouse=True)
def no_search_for_garbage_in_libraries():
    """A collection, which every training and every export starts, takes half a second with a million objects."""
    gc.freeze()


@pytest.fixture
def figures_not_drawn(monkeypatch):
    """Figures are made, but empty files stand for them: to draw one takes a second."""

    def write(figure, stem: Path) -> list[Path]:
        written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return written

    monkeypatch.setattr(plotting, "save", write)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder for each backbone with a pretrained-like checkpoint (no off-ramps, no classifier) and a tokenizer."""
    folders = {}
    for backbone in BACKBONES:
        folder = folders[backbone] = tmp_path_factory.mktemp(backbone)
        base = tiny_model(backbone, initializer_range=0.05).base_model
        stock = next(kind for kind in type(base).__mro__ if kind.__module__.startswith("transformers."))
        plain = stock(base.config)
        plain.load_state_dict(base.state_dict(), strict=False)
        plain.save_pretrained(folder)
        tiny_tokenizer(backbone).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with SST-2, MRPC, MNLI and STS-B in GLUE's layout: 48 lines to train on, 20 to score."""
    root = tmp_path_factory.mktemp("glue")

    def write(path: str, header: str, lines: list[str], start: str = "") -> None:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(start + "\n".join([header, *lines]) + "\n", encoding="utf-8")

    for split, n, seed in (("train", 48, 1), ("dev", 20, 2)):
        rows = sentences(n, seed)
        write(f"SST-2/{split}.tsv", "sentence\tlabel", [f"{text}\t{label}" for text, label in rows])
        pairs = [f"{label}\t{i}\t{i}\t{text}\t{text}" for i, (text, label) in enumerate(rows)]
        write(f"MRPC/{split}.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", pairs, start="\ufeff")
        scored = [f"{i}\t{text}\t{text}\t{5 * label - label / (i + 1)}" for i, (text, label) in enumerate(rows)]
        write(f"STS-B/{split}.tsv", "index\tsentence1\tsentence2\tscore", scored)
        for name in [split] if split == "train" else ["dev_matched", "dev_mismatched"]:
            names = ("contradiction", "entailment", "neutral")
            shift = int(name == "dev_mismatched")
            lines = [f"{i}\t{text}\t{text}\t{names[(i + shift) % 3]}" for i, (text, _) in enumerate(rows)]
            write(f"MNLI/{name}.tsv", "index\tsentence1\tsentence2\tgold_label", lines)
    return root


@pytest.fixture(scope="session")
def small_exports(tmp_path_factory) -> Path:
    """A folder with a model and what the command made of it, see `exported.make_small_exports`. Tests only read it."""
    return once_for_all_workers(tmp_path_factory, "small_exports", make_small_exports)
