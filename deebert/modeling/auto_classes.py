"""Our models in transformers' auto classes and pipelines, so that a saved folder exits early wherever it is loaded.

config.json keeps the backbone's model_type: tools that know the backbone only read the folder as the full model, except
for the classifier of a mean, which they lack.
`architectures` in it names our class, by which AutoModelForSequenceClassification chooses after `import deebert`.
Without that import, `trust_remote_code=True` runs a file in the folder that imports this package.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

from deebert.modeling.backbones import MODELS

REMOTE_CODE = Path(__file__).with_name("modeling_deebert.py")


class AutoLoading:
    """Mixin in front of an HF model: what it saves, the auto classes load with early exit."""

    def save_pretrained(self, save_directory, **kwargs):
        """As for any HF model, with the file that trust_remote_code=True runs; push_to_hub uploads it, too."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
        self.config.auto_map = {
            "AutoConfig": f"{REMOTE_CODE.stem}.{self.config_class.__name__}",
            "AutoModelForSequenceClassification": f"{REMOTE_CODE.stem}.{type(self).__name__}",
        }
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do. transformers calls it with remote code, and would then save a copy of our module."""


def choice(plain: type, ours: type) -> type:
    """A class for transformers' mapping: it loads with `ours` where `architectures` names it, else with `plain`.

    transformers itself chooses among several classes of a mapping by `architectures`, but fails where it is not set.
    """

    def chosen(config) -> type:
        return ours if ours.__name__ in (config.architectures or ()) else plain

    def from_pretrained(cls, *args, config, **kwargs):
        return chosen(config).from_pretrained(*args, config=config, **kwargs)

    def from_config(cls, config, **kwargs):
        return chosen(config)._from_config(config, **kwargs)

    methods = {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(from_config)}
    # with the name and the module of `plain`: pipelines find classes by name, and transformers does not run remote code
    # where the registered class is from a module outside of transformers
    return type(plain.__name__, (plain,), methods | {"__module__": plain.__module__})


def register(model_class: type) -> type:
    """A class decorator: adds a classifier and its config class to those that DeeBERT knows (`backbones.MODELS`).

    AutoModelForSequenceClassification and pipelines then choose a class of ours for the folders that it saved. Plain
    checkpoints in the same process load as before. The last base of a class of ours is transformers' own.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config_class = model_class.config_class
    plain_config, plain_model = config_class.__bases__[-1], model_class.__bases__[-1]
    MODELS.register(config_class, model_class)
    AutoModel.register(config_class, model_class.model_class)  # for models that are made from our config
    AutoModelForSequenceClassification.register(config_class, model_class)
    AutoModelForSequenceClassification.register(plain_config, choice(plain_model, model_class), exist_ok=True)
    return model_class


def load_on_first_use(modeling_auto: ModuleType) -> None:
    """Has AutoModelForSequenceClassification import, and so register, our classes when a model is first loaded by it.

    Not before: this module of transformers is imported in the middle of others that our classes need.
    """
    auto_class = modeling_auto.AutoModelForSequenceClassification

    def after_import(method) -> classmethod:
        @wraps(method)
        def call(cls, *args, **kwargs):
            dict(MODELS)  # reading its entries imports them
            return method(cls, *args, **kwargs)

        return classmethod(call)

    for name in ("from_pretrained", "from_config"):
        setattr(auto_class, name, after_import(getattr(auto_class, name).__func__))


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls `then` with the module of that name, once: now, if it is imported already, or after its first import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _FirstImport(name, then))


class _FirstImport(MetaPathFinder):
    """Finds one module as Python would, and has `then` called after the module's code has run."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the others find it
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_call
        return spec
