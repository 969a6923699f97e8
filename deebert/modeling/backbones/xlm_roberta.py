"""DeeBERT on HF's XLM-RoBERTa: RoBERTa's layers, and HF's own head of two layers."""

from typing import ClassVar

from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification, XLMRobertaModel
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEncoder

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.encoder import HighwayEncoder, HighwayModel


class DeeXLMRobertaConfig(HighwayConfig, XLMRobertaConfig):
    """XLMRobertaConfig with the fields of early exit (see HighwayConfig)."""

    positions_after_padding = True


class DeeXLMRobertaEncoder(HighwayEncoder, XLMRobertaEncoder):
    """XLM-RoBERTa's layers with an off-ramp after each but the last."""


class DeeXLMRobertaModel(HighwayModel, XLMRobertaModel):
    """XLM-RoBERTa with off-ramps in its encoder; on its own it gives the output of XLMRobertaModel."""

    config_class = DeeXLMRobertaConfig
    encoder_class = DeeXLMRobertaEncoder


@register
class DeeXLMRobertaForSequenceClassification(AutoLoading, StockHeadClassifier, XLMRobertaForSequenceClassification):
    """XLM-RoBERTa for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeXLMRobertaConfig
    model_class = DeeXLMRobertaModel
    model_options: ClassVar = {"add_pooling_layer": False}
