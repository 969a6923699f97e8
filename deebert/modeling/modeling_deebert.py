"""By a copy of this file in its folder, transformers loads a model with early exit (trust_remote_code=True)."""

try:
    from deebert.modeling.bert import DeeBertConfig, DeeBertForSequenceClassification
    from deebert.modeling.roberta import DeeRobertaConfig, DeeRobertaForSequenceClassification
except ImportError as error:
    raise ImportError(
        "this model needs the package deebert; install it from its repository (pip install . in a checkout)"
    ) from error

__all__ = [
    "DeeBertConfig",
    "DeeBertForSequenceClassification",
    "DeeRobertaConfig",
    "DeeRobertaForSequenceClassification",
]
