"""The last layer for the first token alone: the one place that knows how a backbone's attention is made.

In evaluation the final classifier reads nothing but the first token's state after the last layer. To compute only that
saves about four fifths of the layer. The logits are Hugging Face's up to rounding.
"""

from torch import Tensor, nn

REPRODUCED = ("eager", "sdpa")  # attention implementations that `first_token_layer` is equal to


def first_token_layer(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """A BERT or RoBERTa layer for the first token, which attends to all: (b, T, H) -> (b, 1, H).

    attention_mask: as scaled_dot_product_attention takes it, (b, 1, 1 or T, T), or None. Forward hooks of the layer and
    of its attention are not called.
    """
    attention, first = layer.attention.self, hidden_states[:, :1]

    def heads(states: Tensor) -> Tensor:  # (b, T, H) -> (b, heads, T, H / heads)
        return states.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    context = nn.functional.scaled_dot_product_attention(
        heads(attention.query(first)),
        heads(attention.key(hidden_states)),
        heads(attention.value(hidden_states)),
        attn_mask=None if attention_mask is None else attention_mask[:, :, :1],
        scale=attention.scaling,
    )
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), first)
    return layer.output(layer.intermediate(attended), attended)


def needs_full_last_layer(config, last_layer: nn.Module, outputs_requested: bool) -> bool:
    """Whether the backbone's own last layer has to run.

    That is so where hidden states or attentions were requested, dropout is on, or the attention is not one that
    `first_token_layer` reproduces.
    """
    other_attention = config.is_decoder or config._attn_implementation not in REPRODUCED
    return outputs_requested or last_layer.training or other_attention
