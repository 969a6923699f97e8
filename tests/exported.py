"""The models of which the tests of the runtimes have an export each."""

import math

import torch
from tiny import tiny_model

CONFIGS = {  # between them: both backbones, two poolings, both heads, temperatures, an exit before the first layer
    "bert": {"highway_pooling": "mean", "exit_rule": "learned", "num_labels": 3},
    "roberta": {
        "highway_pooling": "attention",
        "highway_head": "linear",
        "exit_before_first_layer": True,
        "exit_temperatures": [1.5, 0.5, 2.0, 3.0],
    },
}
LAYERS = 3
NAN_TOKEN = 4  # no random batch has it


def model_to_export(backbone: str):
    model = tiny_model(backbone, num_hidden_layers=LAYERS, **CONFIGS[backbone])
    for name, parameter in model.named_parameters():
        if "query" in name or "learn_to_exit" in name:
            torch.nn.init.normal_(parameter)
    model.get_input_embeddings().weight.data[NAN_TOKEN] = math.nan
    return model


def with_token_types(config, batch: dict, seed: int) -> dict:
    """Both types at random, where the model knows two."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(config.type_vocab_size, batch["input_ids"].shape, generator=generator)
    return batch | {"token_type_ids": types}
