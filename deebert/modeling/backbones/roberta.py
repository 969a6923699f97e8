"""DeeBERT on HF's RoBERTa. As in the original: BERT's pooler and one linear classifier, not HF's own head."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaEncoder

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import HighwayClassifier
from deebert.modeling.config import HighwayConfig, building_with
from deebert.modeling.encoder import HighwayEncoder, HighwayModel
from deebert.modeling.exit_rules import entropy

__all__ = ["DeeRobertaConfig", "DeeRobertaEncoder", "DeeRobertaForSequenceClassification", "DeeRobertaModel", "entropy"]


class DeeRobertaConfig(HighwayConfig, RobertaConfig):
    """RobertaConfig with the fields of early exit (see HighwayConfig)."""

    positions_after_padding = True


class DeeRobertaEncoder(HighwayEncoder, RobertaEncoder):
    """RoBERTa's layers with an off-ramp after each but the last."""


class DeeRobertaModel(HighwayModel, RobertaModel):
    """RoBERTa with off-ramps in its encoder; on its own it gives the output of RobertaModel."""

    config_class = DeeRobertaConfig
    encoder_class = DeeRobertaEncoder


@register
class DeeRobertaForSequenceClassification(AutoLoading, HighwayClassifier, RobertaForSequenceClassification):
    """RoBERTa for classification whose samples exit at the first off-ramp that is certain enough.

    In evaluation our pooler and classifier compute what HF's head of two layers computes. So its weights are saved as
    well: tools that know RoBERTa only read the folder as the full model. Here they are ignored.
    """

    config_class = DeeRobertaConfig
    model_class = DeeRobertaModel
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        *HighwayClassifier._keys_to_ignore_on_load_unexpected,
        r"^classifier\.(dense|out_proj)\.",
    ]

    def __init__(self, config):
        with building_with(config, self.config_class):  # HF's own __init__ makes a backbone without off-ramps
            super(RobertaForSequenceClassification, self).__init__(config)
            self.roberta = self.model_class(config, add_pooling_layer=not config.linear_classifier)
            self.init_head(config)
        self.register_load_state_dict_pre_hook(without_stock_head)
        self.post_init()

    def save_pretrained(self, save_directory, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """As for any HF model, with the weights of HF's own head as well (see the class)."""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        for theirs, ours in {} if self.config.linear_classifier else STOCK_HEAD.items():
            for kind in ("weight", "bias"):
                if f"{ours}.{kind}" in state_dict:  # a caller may give a part only
                    state_dict[f"{theirs}.{kind}"] = state_dict[f"{ours}.{kind}"].clone()
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def load_stock_head(self, name_or_path: str) -> list[str]:
        """Takes over HF's own head of two layers from a checkpoint. Returns the names of the weights that it lacks."""
        stock, info = RobertaForSequenceClassification.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32
        )
        for theirs, ours in STOCK_HEAD.items():
            self.get_submodule(ours).load_state_dict(stock.get_submodule(theirs).state_dict())
        return sorted(info["missing_keys"])


STOCK_HEAD = {"classifier.dense": "roberta.pooler.dense", "classifier.out_proj": "classifier"}  # HF's name: ours


def without_stock_head(model, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Removes HF's own head from a state dict that is about to be loaded."""
    for theirs in STOCK_HEAD:
        for kind in ("weight", "bias"):
            state_dict.pop(f"{prefix}{theirs}.{kind}", None)
