"""A model's layers one at a time, for runtimes that decide themselves which samples run where.

Step i, from 0, ends at exit i: it runs one layer, the first one the embeddings too. Where there is an exit before the
first layer, step 0 is the embeddings alone. Shapes: b samples, T tokens, H hidden, C labels.
"""

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deebert.modeling import checkpoints
from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.runtime.exported import ExitOutput


class LayerRunner:
    """The steps of a PyTorch model in evaluation, whose attention takes additive masks: eager or sdpa."""

    def __init__(self, model):
        self.model, self.base, self.config = model, model.base_model, model.config
        self.off_ramps, self.last = self.base.encoder.off_ramps, len(model.config.exit_layers) - 1

    @torch.inference_mode()
    def __call__(self, **batch: np.ndarray | float | str) -> ExitOutput:
        """Classifies a batch (B, T): the model's arguments, as arrays of numpy, to logits and exit layers likewise."""
        arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
        tensors = {name: torch.as_tensor(array, device=self.model.device) for name, array in arrays.items()}
        output = self.model(**batch | tensors)
        return ExitOutput(output.logits.float().cpu().numpy(), output.exit_layer.cpu().numpy())

    def additive_mask(self, attention_mask: Tensor) -> Tensor:
        """(b, T) -> what layers add to their attention scores (b, 1, 1, T); MPNet's (b, heads, T, T)."""
        dtype = self.model.dtype
        mask = (attention_mask == 0).to(dtype)[:, None, None] * torch.finfo(dtype).min
        return self.base.encoder.layer_mask(mask, attention_mask)

    def layer(self, i: int, inputs: Tensor, mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Step i without its exit. mask: see `additive_mask`.

        The last step's layer is computed for the first token only, where the final classifier reads no other.
        """
        hidden = self.base.embed(inputs, token_type_ids) if i == 0 else inputs
        if i == self.last and self.model.config.first_token_only:
            return self.base.encoder.first_token_layer(hidden, mask)
        layer = self.config.exit_layers[i]
        return hidden if layer == 0 else self.base.encoder.run_layer(layer - 1, hidden, mask)

    def exit(self, i: int, hidden: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """Exit i, also the last: logits (b, C)."""
        if i == self.last:
            return self.model.classify(self.model.final_state(hidden, pooling_weights))
        return self.off_ramps[i](hidden, pooling_weights)


def load_trained(folder: str) -> tuple[LayerRunner, Tokenizer, dict]:
    """A trained model, its tokenizer, and the arguments of `TextEncoder` for both. Raises InputError."""
    checkpoints.quiet_transformers()
    config, tokenizer = checkpoints.load_config(folder), checkpoints.load_tokenizer(folder)
    model = checkpoints.load_model(folder, config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return LayerRunner(model), tokenizer.backend_tokenizer, checkpoints.encoding_facts(config, tokenizer)


def as_tensors(output: ExitOutput) -> HighwayClassifierOutput:
    """An output as a PyTorch model gives it."""
    given = {name: array for name, array in vars(output).items() if array is not None}
    return HighwayClassifierOutput(**{name: torch.as_tensor(array) for name, array in given.items()})
