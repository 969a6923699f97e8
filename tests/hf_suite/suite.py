"""Hugging Face's model tests, on their classes and on ours. `__main__.py` fetches them and runs this file with pytest.

For each encoder there are three test cases: `stock`, transformers' own classes; `never`, ours whose samples never exit;
`exits`, ours with a threshold at which some samples exit.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import torch
import transformers

from deebert.modeling.backbones import MODELS, NAMES

FOLDER = Path(os.environ["HF_TESTS"])  # a package with what the source distribution has in tests/
CONFIG_VALUES = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": torch.float16}
CONFIG_VALUES |= {"chunk_size_feed_forward": 5, "architectures": ["A"], "problem_type": "regression"}
CONFIG_VALUES |= {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}


def their_modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Their tests of models, configs and a training; what they import and is not distributed is empty."""
    sys.path.insert(0, str(FOLDER.parent))
    absent = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_VALUES},
    }
    for name, content in absent.items():
        for part in (name.split(".")[0], name):
            sys.modules[f"{FOLDER.name}.{part}"] = ModuleType(part)
        vars(sys.modules[f"{FOLDER.name}.{name}"]).update(content)
    names = ("test_modeling_common", "test_configuration_common", "test_training_mixin")
    return tuple(importlib.import_module(f"{FOLDER.name}.{name}") for name in names)


modeling, configuration, training = their_modules()

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
SIZES |= {"max_position_embeddings": 512, "num_labels": 3}
OF_ENCODER = {"modernbert": {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 6}}
EXITS = {"exit_threshold": 1.0, "initializer_range": 0.2}  # about half of the samples exit
EXIT_0 = {"exit_before_first_layer": True, "highway_pooling": "mean", "highway_head": "linear"}
WITH_EXIT_0 = ("electra", "distilbert", "modernbert")
SKIPPED = {  # tests that ours cannot pass, and why; docs/reliability.md names them
    "test_can_load_ignoring_mismatched_shapes": "the off-ramps' classifiers change with the number of labels, too",
}


class ModelTester:
    """What their tests read of a model: its sizes, a config and a batch."""

    batch_size, seq_length, is_training = 13, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = (
        SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )

    def __init__(self, config_class: type, settings: dict):
        self.config_class, self.settings = config_class, settings

    def get_config(self):
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self):
        config, shape = self.get_config(), (self.batch_size, self.seq_length)
        ids = modeling.ids_tensor(shape, config.vocab_size)
        inputs = {"input_ids": ids.masked_fill(ids == config.pad_token_id, 5)}  # its position would depend on the ids
        inputs["attention_mask"] = modeling.random_attention_mask(shape)
        return config, inputs


class Case(modeling.ModelTesterMixin, training.TrainingTesterMixin):
    """Their tests for the classes of one encoder. Derived classes set config_class, settings and all_model_classes."""

    config_class: type
    settings: dict
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None  # their mixin of trainings declares it as abstract

    def setUp(self) -> None:
        transformers.set_seed(0)
        modeling.global_rng.seed(0)
        self.model_tester = ModelTester(self.config_class, self.settings)
        self.model_tester.sequence_classification_class = self.all_model_classes[-1]

    def test_config(self) -> None:
        configuration.ConfigTester(self, config_class=self.config_class, max_position_embeddings=77).run_common_tests()

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, torch.Tensor]:
        """A batch for a classifier; theirs has a label for each token."""
        labels = torch.arange(batch_size) % SIZES["num_labels"]
        tokens = torch.arange(1, seq_length + 1).repeat(batch_size, 1) + labels[:, None]
        return {"input_ids": tokens % vocab_size, "labels": labels}


class OurCase(Case):
    """The same for our classes, with the differences that early exit makes."""

    test_all_params_have_gradient = False  # by the labels of stage 1: off-ramps are trained in stage 2

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        for name, reason in SKIPPED.items():
            setattr(cls, name, unittest.skip(reason)(getattr(cls, name)))

    def test_samples_exit(self) -> None:
        """Ours: some samples exit early in the cases with exits, and none in those without."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        with torch.no_grad():
            layers = self.all_model_classes[-1](config).eval()(**inputs).exit_layer.unique().tolist()
        assert layers[-1] == config.num_hidden_layers
        assert (len(layers) > 1) == (config.exit_threshold > 0)


def add_case(model_type: str, variant: str, classifier: type, settings: dict) -> None:
    """Adds a test case to this module."""
    prefix = classifier.__name__.removesuffix("ForSequenceClassification")
    base = getattr(sys.modules[classifier.__module__], f"{prefix}Model")
    modeling.MODEL_MAPPING_NAMES[base.__name__] = base.__name__  # by names of classes they decide what a class can do
    modeling.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[classifier.__name__] = classifier.__name__
    facts = {"config_class": classifier.config_class, "settings": settings, "all_model_classes": (base, classifier)}
    name = f"{model_type.replace('-', '_')}_{variant}"
    kind = Case if variant == "stock" else OurCase
    globals()[name] = type(name, (kind, unittest.TestCase), {**facts, "__module__": __name__})


for names in ("MODEL_MAPPING_NAMES", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"):
    setattr(modeling, names, dict(getattr(modeling, names)))  # a copy, which is not transformers' own
for model_type in NAMES:
    ours = MODELS[model_type][1]
    stock = getattr(transformers, ours.__name__.removeprefix("Dee"))
    settings = SIZES | OF_ENCODER.get(model_type, {})
    add_case(model_type, "stock", stock, settings)
    add_case(model_type, "never", ours, settings)
    add_case(model_type, "exits", ours, settings | EXITS | (EXIT_0 if model_type in WITH_EXIT_0 else {}))
