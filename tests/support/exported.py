"""Models and their exports, which take seconds: tests share them."""

import io
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from support.helpers import once_for_all_workers
from support.tiny import BACKBONES, tiny_model, tiny_tokenizer

from deebert.commands import export
from deebert.modeling.checkpoints import save_model
from deebert.runtime import onnx_export
from deebert.utils import cli

CONFIGS = {  # between them: both backbones, both poolings, both heads, an exit before the first layer
    "bert": {"exit_rule": "confidence", "num_labels": 3},
    "roberta": {
        "highway_pooling": "mean",
        "highway_head": "linear",
        "exit_before_first_layer": True,
    },
}
LAYERS = 3
NAN_TOKEN = 4  # no random batch has it


def model_to_export(backbone: str):
    model = tiny_model(backbone, num_hidden_layers=LAYERS, **CONFIGS[backbone])
    model.get_input_embeddings().weight.data[NAN_TOKEN] = math.nan
    return model


def with_token_types(config, batch: dict, seed: int) -> dict:
    """Both types at random, where the model knows two."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(config.type_vocab_size, batch["input_ids"].shape, generator=generator)
    return batch | {"token_type_ids": types}


@contextmanager
def parts_kept_in(folder: Path) -> Iterator[None]:
    """The parts of a model's graph are traced into this folder, once for all exports of the model."""
    trace = onnx_export.export_parts

    def traced_once(model, parts: Path) -> None:
        if not folder.exists():
            trace(model, parts)
            shutil.copytree(parts, folder)
        shutil.copytree(folder, parts, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export_parts", traced_once)
        yield


def run_export(*arguments) -> str:
    """Runs the command and returns what it prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["export", *map(str, arguments)])
        cli.run(export.main)
    return printed.getvalue()


def make_small_exports(folder: Path) -> None:
    """A model of two layers in folder/model, exports of it, onnx and int8; *.txt is what was printed; and the parts of
    the graph."""
    model = tiny_model("roberta", highway_pooling="mean", initializer_range=0.05, num_hidden_layers=2)
    save_model(model, tiny_tokenizer("roberta"), folder / "model")
    with parts_kept_in(folder / "parts"):
        for name, more in (("onnx", []), ("int8", ["--int8"])):
            printed = run_export("--model", folder / "model", "--output", folder / name, *more)
            (folder / f"{name}.txt").write_text(printed)


def export_and_keep_parts(backbone: str, folder: Path) -> None:
    """Exports a backbone's model to folder/export; the parts of its graph go to folder/parts."""
    with parts_kept_in(folder / "parts"):
        onnx_export.export(model_to_export(backbone), tiny_tokenizer(backbone), folder / "export")


def exports_of_all_workers(tmp_path_factory) -> dict[str, Path]:
    """For each backbone a folder with its export and the parts of the graph, which all tests share."""
    odd = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579"
    return {  # in different orders, so that two workers make one each rather than wait for one another
        backbone: once_for_all_workers(tmp_path_factory, f"export_{backbone}", partial(export_and_keep_parts, backbone))
        for backbone in (reversed(BACKBONES) if odd else BACKBONES)
    }
