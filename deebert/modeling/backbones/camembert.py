"""DeeBERT on HF's CamemBERT: RoBERTa's layers, and HF's own head of two layers."""

from typing import ClassVar

from transformers import CamembertConfig, CamembertForSequenceClassification, CamembertModel
from transformers.models.camembert.modeling_camembert import CamembertEncoder

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.encoder import HighwayEncoder, HighwayModel


class DeeCamembertConfig(HighwayConfig, CamembertConfig):
    """CamembertConfig with the fields of early exit (see HighwayConfig)."""

    positions_after_padding = True


class DeeCamembertEncoder(HighwayEncoder, CamembertEncoder):
    """CamemBERT's layers with an off-ramp after each but the last."""


class DeeCamembertModel(HighwayModel, CamembertModel):
    """CamemBERT with off-ramps in its encoder; on its own it gives the output of CamembertModel."""

    config_class = DeeCamembertConfig
    encoder_class = DeeCamembertEncoder


@register
class DeeCamembertForSequenceClassification(AutoLoading, StockHeadClassifier, CamembertForSequenceClassification):
    """CamemBERT for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeCamembertConfig
    model_class = DeeCamembertModel
    model_options: ClassVar = {"add_pooling_layer": False}
