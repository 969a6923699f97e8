"""The encoders that DeeBERT knows, a module for each in this folder. docs/add_an_encoder.md says how to add one."""

from collections.abc import Iterator, Mapping
from importlib import import_module

# What config.json calls an encoder, its model_type, and what the names of our classes begin with. Its module in this
# folder is called like its model_type.
NAMES = {
    "bert": "DeeBert",
    "roberta": "DeeRoberta",
    "xlm-roberta": "DeeXLMRoberta",
    "camembert": "DeeCamembert",
    "electra": "DeeElectra",
    "distilbert": "DeeDistilBert",
    "modernbert": "DeeModernBert",
    "mpnet": "DeeMPNet",
}


def module_of(model_type: str) -> str:
    """The module with an encoder's classes."""
    return f"{__name__}.{model_type.replace('-', '_')}"


class Models(Mapping):
    """model_type -> (config class, classifier class). A module is imported when its entry is first read."""

    def __init__(self):
        self.registered: dict[str, tuple[type, type]] = {}

    def register(self, config_class: type, model_class: type) -> None:
        """Adds the classes of an encoder. Modules do so when they are imported, through `auto_classes.register`."""
        self.registered[config_class.model_type] = config_class, model_class

    def __getitem__(self, model_type: str) -> tuple[type, type]:
        if model_type not in self.registered and model_type in NAMES:
            import_module(module_of(model_type))
        return self.registered[model_type]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES | self.registered)

    def __len__(self) -> int:
        return len(NAMES | self.registered)


MODELS = Models()
