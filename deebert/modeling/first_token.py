"""The last layer for the first token alone: the one place that knows how a backbone's attention is made.

In evaluation the final classifier reads nothing but the first token's state after the last layer. To compute only that
saves about four fifths of the layer. The logits are Hugging Face's up to rounding.
"""

import torch
from torch import Tensor, nn

REPRODUCED = ("eager", "sdpa")  # attention implementations that `first_token_layer` is equal to


def first_token_layer(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """A layer as BERT, RoBERTa or ELECTRA has it, for the first token, which attends to all: (b, T, H) -> (b, 1, H).

    attention_mask: as scaled_dot_product_attention takes it, (b, 1, 1 or T, T), or None. Forward hooks of the layer and
    of its attention are not called.
    """
    attention, first = layer.attention.self, hidden_states[:, :1]
    query, key, value = attention.query(first), attention.key(hidden_states), attention.value(hidden_states)
    attended = layer.attention.output(attend(attention, query, key, value, attention_mask), first)
    return layer.output(layer.intermediate(attended), attended)


def first_token_distilbert_layer(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The same for a layer of DistilBERT."""
    attention, first = layer.attention, hidden_states[:, :1]
    query, key, value = attention.q_lin(first), attention.k_lin(hidden_states), attention.v_lin(hidden_states)
    context = attention.out_lin(attend(attention, query, key, value, attention_mask))
    attended = layer.sa_layer_norm(context + first)
    return layer.output_layer_norm(layer.ffn(attended) + attended)


def first_token_mpnet_layer(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The same for a layer of MPNet, whose position bias is in the mask."""
    attention, first = layer.attention.attn, hidden_states[:, :1]
    query, key, value = attention.q(first), attention.k(hidden_states), attention.v(hidden_states)
    context = attention.o(attend(attention, query, key, value, attention_mask))
    attended = layer.attention.LayerNorm(context + first)
    return layer.output(layer.intermediate(attended), attended)


def attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Query (b, 1, H), keys and values (b, T, H) -> what the first token reads, of all heads (b, 1, H)."""

    def heads(states: Tensor) -> Tensor:  # (b, T, H) -> (b, heads, T, H / heads)
        return states.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    mask = None if attention_mask is None else attention_mask[:, :, :1]
    context = nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=mask)
    return context.transpose(1, 2).flatten(2)


def needs_full_last_layer(config, last_layer: nn.Module, outputs_requested: bool) -> bool:
    """Whether the backbone's own last layer has to run.

    That is so where its final classifier reads more than the first token, hidden states or attentions were requested,
    dropout is on, the attention is not one that `first_token_layer` reproduces, or the model is exported: Hugging
    Face's own pass is the one that exporters know.
    """
    other_attention = getattr(config, "is_decoder", False) or config._attn_implementation not in REPRODUCED
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return not config.first_token_only or outputs_requested or last_layer.training or other_attention or traced
