"""Exports take seconds: the tests of all runtimes share them."""

import shutil
from pathlib import Path

import pytest
from exported import model_to_export
from helpers import once_for_all_workers
from tiny import BACKBONES, tiny_tokenizer

from deebert.runtime import onnx_export
from deebert.runtime.onnx_runtime import OnnxDeeBert


def export_and_keep_parts(folder: Path) -> None:
    """Exports each backbone's model to folder/{backbone}; the parts of its graph go to folder/{backbone}_parts."""
    export_parts = onnx_export.export_parts
    for backbone in BACKBONES:

        def kept(model, parts, *more, backbone=backbone, **options):
            export_parts(model, parts, *more, **options)
            shutil.copytree(parts, folder / f"{backbone}_parts")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_export, "export_parts", kept)
            onnx_export.export(model_to_export(backbone), tiny_tokenizer(backbone), folder / backbone)


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Path:
    return once_for_all_workers(tmp_path_factory, "exports", export_and_keep_parts)


@pytest.fixture(scope="session")
def models(exports):
    """For each backbone the PyTorch model and its export. A test that changes one sets it back."""
    return {backbone: (model_to_export(backbone), OnnxDeeBert(exports / backbone)) for backbone in BACKBONES}
