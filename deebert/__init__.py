"""Early exit for BERT, RoBERTa and other encoders (DeeBERT, Xin et al., ACL 2020)."""

from importlib import import_module

from deebert.modeling.auto_classes import load_on_first_use, when_imported
from deebert.modeling.backbones import NAMES, module_of
from deebert.utils.cli import missing_package

__version__ = "0.11.0"

# Public names and where they are. Imported when they are first used: `import deebert` alone needs no torch.
_HOME = {
    **{f"{name}ForSequenceClassification": module_of(model_type) for model_type, name in NAMES.items()},
    **{f"{name}Config": module_of(model_type) for model_type, name in NAMES.items()},
    "OnnxDeeBert": "deebert.runtime.onnx_runtime",
    "Classifier": "deebert.runtime.classifier",
    "add_exits": "deebert.experiment.add_exits",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"deebert.{name}: {missing_package(error)}") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


# So that transformers' auto classes know our models, and `import deebert` alone stays without transformers and torch.
when_imported("transformers.models.auto.modeling_auto", load_on_first_use)
