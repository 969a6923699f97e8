"""What early exit costs: floating-point operations of what ran, over those of the full model without off-ramps.

The cost of a data set is the ratio of the two sums over its samples. The mean of each sample's share would flatter:
short texts exit earlier.

Counting layers misleads: the last layer is computed for the first token only and costs about a fifth of a layer, and
off-ramps are not free. Counted are matrix products and the off-ramps' pooling; the embeddings are left out. Each sample
counts with its own number of tokens, without padding. Local attention counts in full: PyTorch and ONNX Runtime compute
the products that its mask hides, too.
Shapes: S samples, N layers, E exits (N, or N+1 with one before the first layer); T tokens, H hidden, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """The operations of each part of a model, for each sample.

    layers: (S, N) of each layer; the last one includes the final pooler and classifier. Their sum is the full model.
    off_ramps: (S, E-1) of each off-ramp. The last of them is after layer N-1.
    """

    layers: np.ndarray
    off_ramps: np.ndarray

    @property
    def full(self) -> np.ndarray:
        """(S,) the operations of the full model."""
        return self.layers.sum(axis=1)

    def of(self, exit_layers: np.ndarray, consulted: Sequence[bool]) -> np.ndarray:
        """(S,) those of samples that exit at these layers (S,). consulted: (E-1,) whether an off-ramp runs at all."""
        num_layers, exit_layers = self.layers.shape[1], np.asarray(exit_layers)[:, None]
        ran = np.arange(1, num_layers + 1) <= exit_layers  # (S, N)
        after_layer = np.arange(num_layers - self.off_ramps.shape[1], num_layers)  # of each off-ramp
        off_ramps_ran = (after_layer <= exit_layers) & np.asarray(consulted, bool)
        return (self.layers * ran).sum(axis=1) + (self.off_ramps * off_ramps_ran).sum(axis=1)


def costs_of(config, lengths: np.ndarray) -> Costs:
    """The costs of samples of these lengths (S,), in tokens, in a model of this config."""
    tokens = np.asarray(lengths, float)
    layers = np.tile(layer_operations(config, tokens, tokens)[:, None], config.num_hidden_layers)
    last = 1 if config.first_token_only else tokens
    layers[:, -1] = layer_operations(config, tokens, last) + head_operations(config, not config.linear_classifier)
    pooling = 2 * tokens * config.hidden_size if config.highway_pooling == "mean" else np.zeros_like(tokens)
    off_ramp = pooling + head_operations(config, has_pooler=config.highway_head == "pooler")
    return Costs(layers, np.tile(off_ramp[:, None], len(config.exit_layers) - 1))


def layer_operations(config, tokens: np.ndarray, queries: np.ndarray | int) -> np.ndarray:
    """Those of one layer on sequences of `tokens` (S,), computed for `queries` tokens, which attend to all."""
    wide, inner = config.hidden_size, config.intermediate_size
    feed_forward = (6 if config.gated_mlp else 4) * wide * inner
    return 4 * tokens * wide**2 + queries * (4 * wide**2 + feed_forward + 4 * tokens * wide)


def head_operations(config, has_pooler: bool) -> int:
    """Those of a classifier on one state, and of the pooler before it, if there is one."""
    pooler = 2 * config.hidden_size**2 if has_pooler else 0
    return pooler + 2 * config.hidden_size * config.num_labels
