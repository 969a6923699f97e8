"""Writes docs/reference.md from the public docstrings: python tests/support/reference.py. A test compares both."""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference.md"
HEAD = """# Reference

The public names, made from their docstrings by `python tests/support/reference.py`. Each is imported when it is first
used. Shapes: B batch, T tokens, H hidden, N layers, E exits, C labels.
"""


def text_of(docstring: str) -> str:
    """A docstring as Markdown: blocks of indented lines become lists, as `name: meaning` begins each entry."""
    lines = []
    for line in inspect.cleandoc(docstring).splitlines():
        entry = re.match(r"(?: {4})?([a-z]\w*(?:, [a-z]\w*)*): (.+)", line)
        if line in ("Args:", ""):
            lines.append("")
        elif entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(line.strip() if not line.startswith("    ") else f"  {line.strip()}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def signature(function) -> str:
    """Its parameters without types and without self."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


def section(title: str, thing, methods: tuple[str, ...] = ()) -> str:
    """A function, or a class with these methods of it."""
    parts = [f"## {title}", text_of(thing.__doc__)]
    for name in methods:
        method = inspect.getattr_static(thing, name)
        if isinstance(method, property):
            parts += [f"### `{name}`", text_of(method.__doc__)]
        else:
            method = method.__func__ if isinstance(method, classmethod) else method
            title = thing.__name__ if name == "__init__" else name
            parts += [f"### `{title}{signature(method)}`", *([text_of(method.__doc__)] if method.__doc__ else [])]
    return "\n\n".join(parts)


def page() -> str:
    """The text of docs/reference.md."""
    import deebert
    from deebert.experiment.add_exits import AddedExits
    from deebert.modeling.classifier import HighwayClassifier, HighwayClassifierOutput
    from deebert.modeling.config import ExitFields
    from deebert.modeling.exit_rules import ExitRule
    from deebert.runtime.classifier import Prediction

    names = [name for name in deebert.__all__ if name.endswith("ForSequenceClassification")]
    models = "The classes are " + ", ".join(f"`deebert.{name}`" for name in names) + "."
    methods = ("forward", "set_exit_threshold", "set_exit_rule", "train_stage")
    return (
        "\n\n".join(
            [
                HEAD.rstrip(),
                section("Models", HighwayClassifier, methods).replace("## Models\n", f"## Models\n\n{models}\n", 1),
                section("Output of a model", HighwayClassifierOutput),
                section("Fields of a config", ExitFields, ("exit_layers",)),
                section("`Classifier`", deebert.Classifier, ("__init__", "__call__")),
                section("`Prediction`", Prediction),
                section(f"`add_exits{signature(deebert.add_exits)}`".replace(repr(print), "print"), deebert.add_exits),
                section("`AddedExits`", AddedExits),
                section("`OnnxDeeBert`", deebert.OnnxDeeBert, ("__init__", "__call__")),
                section("`ExitRule`", ExitRule, ("of_prediction", "cutoff")),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
