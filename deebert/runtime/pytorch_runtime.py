"""A trained model in PyTorch, called like an exported one: arrays of numpy in and out."""

import numpy as np
import torch

from deebert.modeling.checkpoints import encoding_facts, load_config, load_model, load_tokenizer, quiet_transformers
from deebert.runtime.exported import ExitOutput


class PyTorchRuntime:
    """The model of a folder, on the GPU where there is one, with its tokenizer. Raises InputError."""

    def __init__(self, folder: str):
        quiet_transformers()
        config, tokenizer = load_config(folder), load_tokenizer(folder)
        self.model = load_model(folder, config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.tokenizer = self.model.config, tokenizer.backend_tokenizer
        self.encoding = encoding_facts(config, tokenizer)  # arguments of TextEncoder

    @torch.inference_mode()
    def __call__(self, **batch: np.ndarray | float | str) -> ExitOutput:
        """Classifies a batch (B, T): the model's arguments, as arrays of numpy, to logits and exit layers likewise."""
        arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
        tensors = {name: torch.as_tensor(array, device=self.model.device) for name, array in arrays.items()}
        output = self.model(**batch | tensors)
        return ExitOutput(output.logits.float().cpu().numpy(), output.exit_layer.cpu().numpy())
