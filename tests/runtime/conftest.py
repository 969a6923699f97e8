"""Exports take seconds: the tests of all runtimes share them."""

from pathlib import Path

import pytest
from support.exported import exports_of_all_workers, model_to_export
from support.tiny import BACKBONES

from deebert.runtime.onnx_runtime import OnnxDeeBert


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> dict[str, Path]:
    """For each backbone a folder with its export and the parts of the graph."""
    return exports_of_all_workers(tmp_path_factory)


@pytest.fixture(scope="session")
def models(exports):
    """For each backbone the PyTorch model and its export. A test that changes one sets it back."""
    return {backbone: (model_to_export(backbone), OnnxDeeBert(exports[backbone] / "export")) for backbone in BACKBONES}
