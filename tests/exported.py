"""The models of which the tests of the runtimes have an export each, and these exports."""

import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import once_for_all_workers
from tiny import BACKBONES, tiny_model, tiny_tokenizer

from deebert.runtime import onnx_export

CONFIGS = {  # between them: both backbones, two poolings, both heads, temperatures, an exit before the first layer
    "bert": {"highway_pooling": "mean", "exit_rule": "learned", "num_labels": 3},
    "roberta": {
        "highway_pooling": "attention",
        "highway_head": "linear",
        "exit_before_first_layer": True,
        "exit_temperatures": [1.5, 0.5, 2.0, 3.0],
    },
}
LAYERS = 3
NAN_TOKEN = 4  # no random batch has it


def model_to_export(backbone: str):
    model = tiny_model(backbone, num_hidden_layers=LAYERS, **CONFIGS[backbone])
    for name, parameter in model.named_parameters():
        if "query" in name or "learn_to_exit" in name:
            torch.nn.init.normal_(parameter)
    model.get_input_embeddings().weight.data[NAN_TOKEN] = math.nan
    return model


def with_token_types(config, batch: dict, seed: int) -> dict:
    """Both types at random, where the model knows two."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(config.type_vocab_size, batch["input_ids"].shape, generator=generator)
    return batch | {"token_type_ids": types}


def export_and_keep_parts(backbone: str, folder: Path) -> None:
    """Exports a backbone's model to folder/export; the parts of its graph go to folder/parts."""
    export_parts = onnx_export.export_parts

    def kept(model, parts, *more, **options):
        export_parts(model, parts, *more, **options)
        shutil.copytree(parts, folder / "parts")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export_parts", kept)
        onnx_export.export(model_to_export(backbone), tiny_tokenizer(backbone), folder / "export")


def exports_of_all_workers(tmp_path_factory) -> dict[str, Path]:
    """For each backbone a folder with its export and the parts of the graph, which all tests share."""
    odd = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579"
    return {  # in different orders, so that two workers make one each rather than wait for one another
        backbone: once_for_all_workers(tmp_path_factory, f"export_{backbone}", partial(export_and_keep_parts, backbone))
        for backbone in (reversed(BACKBONES) if odd else BACKBONES)
    }
