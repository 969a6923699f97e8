"""A toy encoder as a library would have it, and its early exit: what docs/add_an_encoder.md describes."""

from typing import ClassVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils.output_capturing import capture_outputs

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.encoder import HighwayEncoder, HighwayModel


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    vocab_size: int = 300
    hidden_size: int = 32
    num_hidden_layers: int = 4
    num_attention_heads: int = 1
    intermediate_size: int = 48
    max_position_embeddings: int = 66
    hidden_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.2
    pad_token_id: int = 0


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        wide, inner = config.hidden_size, config.intermediate_size
        self.qkv, self.out = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.mlp = nn.Sequential(nn.Linear(wide, inner), nn.ReLU(), nn.Linear(inner, wide))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(wide)

    def forward(self, hidden_states, mask, **kwargs):
        query, key, value = self.qkv(hidden_states)[:, None].chunk(3, dim=-1)  # (b, 1 head, T, H)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)[:, 0]
        mixed = hidden_states + self.dropout(self.out(mixed))
        return self.norm(mixed + self.mlp(mixed))


class ToyEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden_states)


class ToyModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = ToyConfig, "toy", True
    _can_record_outputs: ClassVar = {"hidden_states": ToyLayer}

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.encoder = nn.Embedding(config.vocab_size, config.hidden_size), ToyEncoder(config)
        self.post_init()

    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else (attention_mask == 0)[:, None, None] * -1e30
        return self.encoder(hidden_states, attention_mask=mask, **kwargs)


class ToyForSequenceClassification(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = ToyConfig, "toy", True

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.toy, self.classifier = ToyModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.toy(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(states[:, 0]))


AutoConfig.register("toy", ToyConfig)

# Early exit for it begins here.


class DeeToyConfig(HighwayConfig, ToyConfig):
    type_vocab_size = 0  # no token types
    first_token_only = False  # its last layer runs in full


class DeeToyEncoder(HighwayEncoder, ToyEncoder):
    """Its `layer` is the list of layers, each of which takes hidden states and a mask."""


class DeeToyModel(HighwayModel, ToyModel):
    config_class = DeeToyConfig
    encoder_class = DeeToyEncoder


@register
class DeeToyForSequenceClassification(AutoLoading, StockHeadClassifier, ToyForSequenceClassification):
    config_class = DeeToyConfig
    model_class = DeeToyModel

    def stock_head(self, state):  # the first token's state -> logits
        return self.classifier(state)
