"""DeeBERT on HF's ModernBERT: rotary positions, attention that is local in most layers, no encoder module, no pooler.

Where BERT's layers need a mask, those of ModernBERT need the rotary embeddings of the positions too, and the local ones
the window in their mask. Both follow from the number of tokens: a batch may shrink, and a runtime may run any layer.
"""

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification, ModernBertModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig, building_with
from deebert.modeling.early_exit import ExitRequest
from deebert.modeling.encoder import HighwayEncoder


class DeeModernBertConfig(HighwayConfig, ModernBertConfig):
    """ModernBertConfig with the fields of early exit (see HighwayConfig)."""

    type_vocab_size = 0
    pre_norm = True
    gated_mlp = True
    first_token_only = False  # its last layer always runs in full
    linear_classifier = False  # HF's head reads the mean, too


class DeeModernBertModel(HighwayEncoder, ModernBertModel):
    """ModernBERT with off-ramps; on its own it gives the output of ModernBertModel. It is its own encoder."""

    config_class = DeeModernBertConfig

    def __init__(self, config):
        with building_with(config, self.config_class):
            super().__init__(config)
        self.post_init()

    @property
    def encoder(self) -> "DeeModernBertModel":
        return self

    @property
    def layer(self) -> nn.ModuleList:
        """The layers, under BERT's name for them."""
        return self.layers

    def run_layer(
        self, i: int, hidden_states: Tensor, attention_mask: Tensor | None, known: dict | None = None, **kwargs
    ) -> Tensor:
        """See HighwayEncoder. known: the positions of earlier layers, most of which have as many tokens."""
        layer, key = self.layers[i], (hidden_states.shape[1], self.layers[i].attention_type)
        if key[1] == "sliding_attention" and self.config._attn_implementation in ("eager", "sdpa"):
            attention_mask = with_window(attention_mask, hidden_states, self.config.sliding_window)
        embeddings = None if known is None else known.get(key)
        if embeddings is None:
            positions = torch.arange(key[0], device=hidden_states.device)
            embeddings = self.rotary_emb(hidden_states, positions[None], key[1])  # cosines and sines (1, T, H / heads)
        if known is not None:  # without it the number of tokens may be a symbol, which is no key
            known[key] = embeddings
        states = layer(hidden_states, attention_mask=attention_mask, position_embeddings=embeddings, **kwargs)
        return self.final_norm(states) if i == len(self.layers) - 1 else states

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """See HighwayModel."""
        return self.embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        exits: ExitRequest | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """HF's own pass, or one with exits (see HighwayEncoder)."""
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds)
        if exits is None:
            return super(HighwayEncoder, self).forward(*inputs, **kwargs)
        return self._forward_with(exits, *inputs, **kwargs)

    @capture_outputs
    def _forward_with(self, exits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs) -> BaseModelOutput:
        if position_ids is not None or self.config._attn_implementation == "flex_attention":
            raise ValueError("ModernBERT's exits take no position_ids, and no flex_attention: use sdpa or eager")
        hidden_states = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        mask = create_bidirectional_mask(self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        return BaseModelOutput(last_hidden_state=self.run(exits, hidden_states, mask, known={}, **kwargs))


@register
class DeeModernBertForSequenceClassification(AutoLoading, StockHeadClassifier, ModernBertForSequenceClassification):
    """ModernBERT for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeModernBertConfig
    model_class = DeeModernBertModel

    def stock_head(self, state: Tensor) -> Tensor:
        """HF's head: (b, H) -> (b, C)."""
        return self.classifier(self.drop(self.head(state)))


def with_window(mask: Tensor | None, hidden_states: Tensor, reach: int) -> Tensor | None:
    """A mask for attention between tokens that are at most `reach` apart.

    mask: (b, 1, 1 or T, T), what may be attended to or what is added to the scores, or None; returned like this.
    """
    tokens = hidden_states.shape[1]
    if not torch.compiler.is_compiling() and tokens <= reach + 1:
        return mask
    place = torch.arange(tokens, device=hidden_states.device)
    near = ((place[:, None] - place).abs() <= reach)[None, None]  # (1, 1, T, T)
    if mask is not None and mask.dtype == torch.bool:
        return mask & near
    far = (~near).to(hidden_states.dtype) * torch.finfo(hidden_states.dtype).min
    return far if mask is None else torch.minimum(mask, far)
