"""DeeBERT on HF's RoBERTa. As in the original: BERT's pooler and one linear classifier, not HF's own head."""

from typing import ClassVar

from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers.models.roberta.modeling_roberta import RobertaEncoder

from deebert.modeling.classifier import HighwayClassifier
from deebert.modeling.config import HighwayConfig, add_highway_fields
from deebert.modeling.exit_rules import entropy
from deebert.modeling.off_ramps import HighwayEncoder, HighwayModel

__all__ = ["DeeRobertaConfig", "DeeRobertaEncoder", "DeeRobertaForSequenceClassification", "DeeRobertaModel", "entropy"]


class DeeRobertaConfig(HighwayConfig, RobertaConfig):
    """RobertaConfig with the fields of early exit (see HighwayConfig)."""

    attribute_map: ClassVar = {**RobertaConfig.attribute_map, **HighwayConfig.ALIASES}


class DeeRobertaEncoder(HighwayEncoder, RobertaEncoder):
    """RoBERTa's layers with an off-ramp after each but the last."""


class DeeRobertaModel(HighwayModel, RobertaModel):
    """RoBERTa with off-ramps in its encoder; on its own it gives the output of RobertaModel."""

    config_class = DeeRobertaConfig
    encoder_class = DeeRobertaEncoder


class DeeRobertaForSequenceClassification(HighwayClassifier, RobertaForSequenceClassification):
    """RoBERTa for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeRobertaConfig

    def __init__(self, config):
        add_highway_fields(config, self.config_class)
        super(RobertaForSequenceClassification, self).__init__(
            config
        )  # HF's __init__ builds a RoBERTa without off-ramps
        self.roberta = DeeRobertaModel(config)
        self.init_head(config)
        self.post_init()


AutoModelForSequenceClassification.register(DeeRobertaConfig, DeeRobertaForSequenceClassification)  # for pipelines
