"""DeeBERT: HF's BERT with off-ramps. Parameter names are the original's, so its checkpoints load as they are."""

from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.models.bert.modeling_bert import BertEncoder

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import HighwayClassifier
from deebert.modeling.config import HighwayConfig, building_with
from deebert.modeling.encoder import HighwayEncoder, HighwayModel
from deebert.modeling.exit_rules import entropy

__all__ = ["DeeBertConfig", "DeeBertEncoder", "DeeBertForSequenceClassification", "DeeBertModel", "entropy"]


class DeeBertConfig(HighwayConfig, BertConfig):
    """BertConfig with the fields of early exit (see HighwayConfig)."""


class DeeBertEncoder(HighwayEncoder, BertEncoder):
    """BERT's layers with an off-ramp after each but the last."""


class DeeBertModel(HighwayModel, BertModel):
    """BERT with off-ramps in its encoder; on its own it gives the output of BertModel."""

    config_class = DeeBertConfig
    encoder_class = DeeBertEncoder


@register
class DeeBertForSequenceClassification(AutoLoading, HighwayClassifier, BertForSequenceClassification):
    """BERT for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeBertConfig
    model_class = DeeBertModel

    def __init__(self, config):
        with building_with(config, self.config_class):  # HF's own __init__ makes a backbone without off-ramps
            super(BertForSequenceClassification, self).__init__(config)
            self.bert = self.model_class(config, add_pooling_layer=not config.linear_classifier)
            self.init_head(config)
        self.post_init()
