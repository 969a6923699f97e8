"""The last layer for the first token alone: its attention, and when it may stand in for the layer.

In evaluation the final classifier reads nothing but the first token's state after the last layer. To compute only that
saves about four fifths of the layer. The logits are Hugging Face's up to rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CAPTURE = "transformers.utils.output_capturing"


def attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Query (b, 1, H), keys and values (b, T, H) -> what the first token reads, of all heads (b, 1, H)."""

    def heads(states: Tensor) -> Tensor:  # (b, T, H) -> (b, heads, T, H / heads)
        return states.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    mask = None if attention_mask is None else attention_mask[:, :, :1]
    context = nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=mask)
    return context.transpose(1, 2).flatten(2)


def bypassed(layer: nn.Module, attention_path: Sequence[str]) -> list[nn.Module | None]:
    """The modules whose own forward `first_token_layer` does not call: the layer, and those down to its attention."""
    modules = [layer]
    for name in attention_path:
        modules.append(getattr(modules[-1], name, None))
    return modules


def can_stand_in(config, layer: nn.Module, attention_path: Sequence[str], classes: Sequence[type]) -> bool:
    """Whether the last layer for the first token alone gives all that is read of what this layer gives.

    Not so where more tokens are read, the attention is another one, dropout is on, or something is tied to the modules
    that are not called: a wrapper, a class that is not the one of `classes`, a patched forward, a hook. Compilers and
    exporters get Hugging Face's own layer, which they know.
    """
    known = not getattr(config, "is_decoder", False) and config._attn_implementation in ("eager", "sdpa")
    if not (config.first_token_only and known) or layer.training:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    for module, kind in zip(bypassed(layer, attention_path), classes, strict=True):
        if type(module) is not kind or "forward" in vars(module):
            return False
        for hook in (hook for name in HOOKS for hook in getattr(module, name).values()):
            if getattr(hook, "__module__", None) != CAPTURE:  # those do nothing unless hidden states are requested
                return False
    return True
