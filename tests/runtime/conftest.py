"""Exports take seconds: the tests of all runtimes share them."""

import os
from functools import partial
from pathlib import Path

import pytest
from exported import model_to_export, parts_kept_in
from helpers import once_for_all_workers
from tiny import BACKBONES, tiny_tokenizer

from deebert.runtime import onnx_export
from deebert.runtime.onnx_runtime import OnnxDeeBert


def export_and_keep_parts(backbone: str, folder: Path) -> None:
    """Exports a backbone's model to folder/export; the parts of its graph go to folder/parts."""
    with parts_kept_in(folder / "parts"):
        onnx_export.export(model_to_export(backbone), tiny_tokenizer(backbone), folder / "export")


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> dict[str, Path]:
    """For each backbone a folder with its export and the parts of the graph."""
    odd = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579"
    return {  # in different orders, so that two workers make one each rather than wait for one another
        backbone: once_for_all_workers(tmp_path_factory, f"export_{backbone}", partial(export_and_keep_parts, backbone))
        for backbone in (reversed(BACKBONES) if odd else BACKBONES)
    }


@pytest.fixture(scope="session")
def models(exports):
    """For each backbone the PyTorch model and its export. A test that changes one sets it back."""
    return {backbone: (model_to_export(backbone), OnnxDeeBert(exports[backbone] / "export")) for backbone in BACKBONES}
