"""Models without early exit: how many layers they get, how they are saved and scored.

A model of --train_strategy static is an ordinary Hugging Face model. One of static_off_ramp has a layer more than it
runs: it always exits before the last one.
"""

from dataclasses import fields

from transformers import PreTrainedModel

from deebert.experiment.arguments import Arguments
from deebert.modeling.config import HighwayConfig, config_rule
from deebert.modeling.exit_rules import NO_EXIT
from deebert.modeling.off_ramps import is_off_ramp


def layers_wanted(args: Arguments, available: int) -> int:
    """The number of layers that --num_layers sets."""
    return available if args.num_layers is None else args.num_layers + (args.train_strategy == "static_off_ramp")


def static_exit(args: Arguments, config) -> int | None:
    """The only exit, from 0, of a model without early exit; None for others."""
    last = config.num_hidden_layers - 1
    return {"static": last, "static_off_ramp": last - 1}.get(args.train_strategy)


def finished_model(args: Arguments, model) -> PreTrainedModel:
    """The model as it is saved after the training."""
    if args.train_strategy == "static":
        return without_exits(model)
    if args.train_strategy == "static_off_ramp":
        always = config_rule(model.config).exit_all_threshold()
        model.set_exit_threshold([NO_EXIT] * (len(model.config.exit_layers) - 2) + [always])
    return model


def without_exits(model) -> PreTrainedModel:
    """A BERT without its off-ramps: an instance of Hugging Face's own class, with the same weights."""
    plain_class = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    ours = {field.name for field in fields(HighwayConfig)} | {"architectures"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    plain = plain_class(plain_class.config_class.from_dict(config))
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not is_off_ramp(name)})
    return plain
