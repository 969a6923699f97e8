"""Models without exits: how --train_strategy static saves one, and how one is loaded to be scored or to teach."""

from dataclasses import fields

from transformers import PreTrainedModel

from deebert.modeling.checkpoints import load_pretrained
from deebert.modeling.config import HighwayConfig
from deebert.modeling.off_ramps import is_off_ramp
from deebert.utils.cli import InputError


def without_exits(model) -> PreTrainedModel:
    """A BERT without its off-ramps: an instance of Hugging Face's own class, with the same weights."""
    plain_class = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    ours = {field.name for field in fields(HighwayConfig)} | {"architectures"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    plain = plain_class(plain_class.config_class.from_dict(config))
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not is_off_ramp(name)})
    return plain


def load_final_classifier(name_or_path: str, config):
    """A fine-tuned model, to use its final classifier alone; off-ramps that it lacks are random. Raises InputError."""
    model, missing = load_pretrained(name_or_path, config)
    if lacking := [name for name in missing if not is_off_ramp(name)]:
        raise InputError(f"{name_or_path}: not a fine-tuned classifier, it has no {lacking[0]}")
    return model
