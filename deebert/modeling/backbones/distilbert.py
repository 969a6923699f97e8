"""DeeBERT on HF's DistilBERT, which has no token types and no pooler, and names its parts differently from BERT."""

from typing import ClassVar

from torch import Tensor
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel
from transformers.models.distilbert.modeling_distilbert import Transformer

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.encoder import HighwayEncoder, HighwayModel
from deebert.modeling.first_token import attend


class DeeDistilBertConfig(HighwayConfig, DistilBertConfig):
    """DistilBertConfig with the fields of early exit (see HighwayConfig), and BERT's names for its own."""

    attribute_map: ClassVar = {
        **DistilBertConfig.attribute_map,
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "classifier_dropout": "seq_classif_dropout",
    }
    type_vocab_size = 0


class DeeDistilBertEncoder(HighwayEncoder, Transformer):
    """DistilBERT's layers with an off-ramp after each but the last."""

    attention_path = ("attention",)

    def first_token_layer(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See HighwayEncoder."""
        layer, attention, first = self.layer[-1], self.layer[-1].attention, hidden_states[:, :1]
        query, key, value = attention.q_lin(first), attention.k_lin(hidden_states), attention.v_lin(hidden_states)
        context = attention.out_lin(attend(attention, query, key, value, attention_mask))
        attended = layer.sa_layer_norm(context + first)
        return layer.output_layer_norm(layer.ffn(attended) + attended)


class DeeDistilBertModel(HighwayModel, DistilBertModel):
    """DistilBERT with off-ramps in its encoder; on its own it gives the output of DistilBertModel."""

    config_class = DeeDistilBertConfig
    encoder_class = DeeDistilBertEncoder
    encoder_name = "transformer"

    @property
    def encoder(self) -> DeeDistilBertEncoder:
        return self.transformer


@register
class DeeDistilBertForSequenceClassification(AutoLoading, StockHeadClassifier, DistilBertForSequenceClassification):
    """DistilBERT for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeDistilBertConfig
    model_class = DeeDistilBertModel

    def init_head(self, config) -> None:
        super().init_head(config)
        del self.pre_classifier

    def stock_head(self, state: Tensor) -> Tensor:
        """HF's head: (b, H) -> (b, C)."""
        return self.classifier(self.dropout(self.pre_classifier(state).relu()))
