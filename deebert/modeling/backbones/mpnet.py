"""DeeBERT on HF's MPNet: BERT's layers with a relative position bias, and HF's own head of two layers.

All layers add the same bias to their attention scores. It depends on the number of tokens only, so here it is a part of
the mask: what shrinks the mask of a batch shrinks the bias, and a layer needs nothing else.
"""

from typing import ClassVar

from torch import Tensor
from transformers import MPNetConfig, MPNetForSequenceClassification, MPNetModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetLayer, MPNetSelfAttention
from transformers.utils.output_capturing import capture_outputs

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.early_exit import ExitRequest
from deebert.modeling.encoder import HighwayEncoder, HighwayModel
from deebert.modeling.first_token import attend


class DeeMPNetConfig(HighwayConfig, MPNetConfig):
    """MPNetConfig with the fields of early exit (see HighwayConfig)."""

    type_vocab_size = 0
    positions_after_padding = True


class DeeMPNetEncoder(HighwayEncoder, MPNetEncoder):
    """MPNet's layers with an off-ramp after each but the last."""

    attention_path = ("attention", "attn")

    def run_layer(self, i: int, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """See HighwayEncoder."""
        return super().run_layer(i, hidden_states, attention_mask, **kwargs)[0]

    def layer_mask(self, mask: Tensor | None, inputs: Tensor) -> Tensor:
        """The mask with the position bias, (b, heads, T, T). inputs: (b, T) or (b, T, H)."""
        bias = self.compute_position_bias(inputs)
        return bias if mask is None else bias + mask

    def first_token_layer(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See HighwayEncoder. The position bias is in the mask."""
        layer, attention, first = self.layer[-1], self.layer[-1].attention.attn, hidden_states[:, :1]
        query, key, value = attention.q(first), attention.k(hidden_states), attention.v(hidden_states)
        context = attention.o(attend(attention, query, key, value, attention_mask))
        attended = layer.attention.LayerNorm(context + first)
        return layer.output(layer.intermediate(attended), attended)


class DeeMPNetModel(HighwayModel, MPNetModel):
    """MPNet with off-ramps in its encoder; on its own it gives the output of MPNetModel."""

    config_class = DeeMPNetConfig
    encoder_class = DeeMPNetEncoder
    _can_record_outputs: ClassVar = {"hidden_states": MPNetLayer, "attentions": MPNetSelfAttention}

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        exits: ExitRequest | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """HF's own pass, or one with exits: HF's model passes nothing on to its encoder."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if exits is None:
            inputs = (input_ids, attention_mask, position_ids, inputs_embeds, output_attentions)
            return super().forward(*inputs, output_hidden_states=False, return_dict=True)
        hidden_states = self.embeddings(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        mask = create_bidirectional_mask(self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        return self.encoder(hidden_states, mask, exits=exits, output_attentions=output_attentions)


@register
class DeeMPNetForSequenceClassification(AutoLoading, StockHeadClassifier, MPNetForSequenceClassification):
    """MPNet for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeMPNetConfig
    model_class = DeeMPNetModel
    model_options: ClassVar = {"add_pooling_layer": False}
