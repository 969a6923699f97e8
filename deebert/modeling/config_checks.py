"""What may be wrong with a config. Each check raises ValueError with one line that names the field and what to give."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

ALIASES = {"early_exit_entropy": "exit_threshold"}  # names of the original: ours
MOST_LAYERS = 1000  # no BERT comes near it; building more takes hours
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def check_architecture(model_type: str, config_class: type) -> None:
    """Raises ValueError where a checkpoint of this model_type is none for `config_class`."""
    if model_type != config_class.model_type:
        ours = config_class.__name__.removesuffix("Config")
        raise ValueError(
            f"a {model_type} checkpoint; {ours}ForSequenceClassification reads {config_class.model_type} checkpoints"
        )


def check_stored(facts: Mapping) -> None:
    """Raises ValueError where a stored config has two different thresholds, or an attention that others wrote.

    transformers would fetch the code of an unknown one from the hub, and run it.
    """
    for name in ("attn_implementation", "_attn_implementation"):
        if facts.get(name) not in (None, *ATTENTIONS):
            raise ValueError(f"{name} is {repr(facts[name])[:100]}; choose one of {', '.join(ATTENTIONS)}")
    for alias, name in ALIASES.items():
        if alias in facts and name in facts and facts[alias] != facts[name]:
            raise ValueError(f"{alias} is {facts[alias]!r}, and {name}, the same, is {facts[name]!r}; remove one")


def check_fields(config) -> None:
    """Raises ValueError where the number of layers, the labels or a field of early exit have no meaning.

    Whether the threshold is one of the rule's is for `config_cutoffs`: commands change both before they load weights.
    """
    check_stored(vars(config))
    for name, (valid, wanted) in CHECKS.items():
        if hasattr(config, name) and not valid(value := getattr(config, name)):
            raise ValueError(f"{name} is {repr(value)[:100]}; give {wanted}")
    check_labels(config.id2label)


def is_whole(value, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_number(value) -> bool:
    """Whether this is a number that a float can hold. NaN and infinity are."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return isinstance(float(value), float)
    except OverflowError:
        return False


def is_threshold(value) -> bool:
    return is_number(value) or (isinstance(value, list | tuple) and all(map(is_number, value)))


SIZE = (lambda value: is_whole(value, 1), "a number from 1")
CHECKS = {  # by the name of a field, where a config has it: what is valid, and the same in words
    "num_hidden_layers": (lambda n: is_whole(n, 1) and n <= MOST_LAYERS, f"a number from 1 to {MOST_LAYERS}"),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "local_attention"), SIZE),  # the latter is ModernBERT's
    "chunk_size_feed_forward": (lambda size: size in (0, 1), "0: it has to divide the number of tokens of every text"),
    "problem_type": (lambda value: value in (None, *PROBLEMS), f"one of {', '.join(PROBLEMS)}"),
    "pad_token_id": (lambda value: is_whole(value, 0), "the id of the padding token"),
    "exit_before_first_layer": (lambda value: isinstance(value, bool), "true or false"),
    "max_seq_length": (lambda value: value is None or is_whole(value, 1), "null, or a number of tokens"),
    "exit_threshold": (is_threshold, "a number, or a list with one for each off-ramp"),
    "min_confidence": (lambda value: is_number(value) and 0 <= value <= 1, "a share from 0 to 1"),
    "patience_tolerance": (lambda value: is_number(value) and value >= 0, "a number from 0"),
    "classifier_pooling": (lambda value: value in ("cls", "mean"), "cls or mean"),
    **dict.fromkeys(("exit_rule", "highway_pooling", "highway_head"), (lambda value: isinstance(value, str), "a name")),
}


def check_labels(id2label: dict) -> None:
    """Raises ValueError where this is no table of labels, each once, by the numbers of the outputs."""
    if not isinstance(id2label, dict) or {*map(str, id2label)} != {*map(str, range(len(id2label) or 1))}:
        raise ValueError(f"id2label is {str(id2label)[:100]}; give a name for each output: 0, 1, 2, ...")
    name, count = Counter(map(str, id2label.values())).most_common(1)[0]
    if count > 1:
        raise ValueError(f"id2label has {name[:100]!r} more than once; give each output a name of its own")
    try:
        "".join(map(str, id2label.values())).encode()
    except UnicodeError as error:
        raise ValueError(f"id2label has {error.object[error.start]!r}, which is no Unicode text") from None


def plain_threshold(threshold: float | Sequence[float]) -> float | list[float]:
    """A threshold, or one per off-ramp, of any kind of numbers (numpy's, a tensor's) as floats. Raises ValueError."""
    if isinstance(threshold, str):
        raise ValueError(f"exit_threshold is the string {threshold!r}; give a number")
    if getattr(threshold, "ndim", None) == 0:  # an array or a tensor of one number
        threshold = threshold.item()
    try:
        return float(threshold) if isinstance(threshold, Real) else [float(v) for v in threshold]
    except TypeError:
        raise ValueError(f"exit_threshold is {threshold!r}; give a number, or one for each off-ramp") from None
