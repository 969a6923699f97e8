"""Exports take seconds: the tests of all runtimes share them."""

import shutil

import pytest
from exported import model_to_export
from tiny import BACKBONES, tiny_tokenizer

from deebert.runtime import onnx_export
from deebert.runtime.onnx_runtime import OnnxDeeBert


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """For each backbone a PyTorch model, the folder of its export and the parts of which the graph was made."""
    made, export_parts = {}, onnx_export.export_parts
    for backbone in BACKBONES:
        folder, parts = tmp_path_factory.mktemp(backbone), tmp_path_factory.mktemp("parts")

        def kept(model, temporary, *more, parts=parts, **options):
            export_parts(model, temporary, *more, **options)
            shutil.copytree(temporary, parts, dirs_exist_ok=True)

        model = model_to_export(backbone)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_export, "export_parts", kept)
            onnx_export.export(model, tiny_tokenizer(backbone), folder)
        made[backbone] = model, folder, parts
    return made


@pytest.fixture(scope="session")
def models(exports):
    """For each backbone the PyTorch model and its export. A test that changes one sets it back."""
    return {backbone: (model, OnnxDeeBert(folder)) for backbone, (model, folder, _) in exports.items()}
