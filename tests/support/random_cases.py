"""What the fuzz tries: random models, batches and rules, and thresholds near the uncertainties that occur."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from support.brute_force import LABEL_RULES, AllExits, measured

from deebert.modeling.backbones import MODELS

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FIRST_WORD = 5  # ids below are special
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
NEVER = -1.0
SHARES = st.integers(0, 998).map(lambda n: n / 999)  # hypothesis' own floats are close to 0 most of the time
SPECIAL = (0.5, 0.75, 1.0)  # what off-ramps without weights measure, without a rounding error

Choose = Callable[[Sequence], object]  # one of several, by hypothesis or by a random number generator


def model_settings(choose: Choose, encoder: str, depths: Sequence[int] = (1, 2, 3, 3, 4, 4, 5)) -> dict:
    """The config of a model of this encoder."""
    labels, problem = choose([(2, None)] * 3 + [(1, None), (3, None), (4, None), (5, None), (1, True), (3, True)])
    layers, pooling = choose(depths), choose(["first", "mean"])
    exit_0 = pooling != "first" and choose([False, True])
    settings = SIZES | {
        "num_hidden_layers": layers,
        "num_attention_heads": choose([2, 4]),
        "max_position_embeddings": choose([20, 24, 40]),
        "num_labels": labels,
        "problem_type": "multi_label_classification" if problem else None,
        "highway_pooling": pooling,
        "highway_head": choose(["pooler", "linear"]),
        "exit_before_first_layer": exit_0,
        "exit_rule": choose([*(LABEL_RULES if labels > 1 or problem else ()), "patience"]),
        "classifier_pooling": choose(["cls", "cls", "mean"]),
        "patience_tolerance": choose([0.5, 0.5, 0.25, 0.0]),
        "pad_token_id": choose([0, 1]),
    }
    if encoder not in ("distilbert", "mpnet"):
        settings["type_vocab_size"] = choose([1, 2])
    if encoder == "electra":
        settings["embedding_size"] = choose([8, 16])
    if encoder == "modernbert":
        settings |= {"local_attention": choose([2, 6, 128]), "global_attn_every_n_layers": choose([1, 2, 3])}
        settings |= {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}
        del settings["type_vocab_size"]
    if encoder == "mpnet":
        settings["pad_token_id"] = 1  # its positions know no other
    return settings


@dataclass(frozen=True)
class Weights:
    """How random weights are made. constant: off-ramps whose classifiers have a bias only."""

    seed: int
    scale: float
    sharpness: float
    constant: tuple[int, ...]

    @classmethod
    def choose(cls, choose: Choose, dtype: str = "float32") -> "Weights":
        """Attention with large weights is a choice between tokens: bfloat16 would take it by rounding errors."""
        scale = 0.5 if dtype == "bfloat16" else choose([0.5, 1.0, 2.0])
        constant = choose([(), (), (0,), (1,), (0, 1), (1, 2)])
        return cls(choose(range(1 << 32)), scale, choose([1.0, 3.0, 8.0]), constant)

    def fill(self, model) -> None:
        rng = np.random.default_rng(self.seed)
        for name, parameter in model.named_parameters():
            draw = rng.normal(size=parameter.shape)
            if "embeddings" in name and parameter.dim() == 2 and "highway" not in name:
                factor, shift = 1.0, 0.0
            elif parameter.dim() == 2:
                ours = "highway" in name or name.startswith("classifier")
                factor, shift = (self.sharpness if ours else self.scale) / math.sqrt(parameter.shape[1]), 0.0
            elif "norm" in name.lower() and name.endswith("weight"):
                factor, shift = 0.3, 1.0
            else:
                factor, shift = 0.3, 0.0
            parameter.data.copy_(torch.from_numpy(factor * draw + shift))
        off_ramps = model.base_model.encoder.off_ramps
        for i in self.constant:
            if i < len(off_ramps):
                torch.nn.init.zeros_(off_ramps[i].classifier.weight)
                off_ramps[i].classifier.bias.data.fill_(0.5 * (i % 2) if model.config.num_labels == 1 else 0)


def make_model(encoder: str, settings: dict, weights: Weights, dtype: str = "float32", attention: str | None = None):
    """A model of ours in evaluation. attention: an implementation, Hugging Face's choice by default."""
    config_class, model_class = MODELS[encoder]
    model = model_class(config_class(**settings, attn_implementation=attention)).eval()
    weights.fill(model)
    return model.to(DTYPES[dtype])


def longest_text(config) -> int:
    """The tokens that the positions of a model are enough for."""
    after = config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0
    return config.max_position_embeddings - after


@dataclass(frozen=True)
class Texts:
    """A batch. lengths: tokens of each row, as shares of the longest text that the model takes; 0: padding only."""

    lengths: tuple[float, ...]
    padding: int
    mask: str  # right, left, holes or none
    mask_dtype: str
    token_types: bool
    seed: int

    def tensors(self, config, longest: int = 10**9) -> dict[str, torch.Tensor]:
        """input_ids and, unless there is no padding and none is wanted, attention_mask, and token_type_ids (B, T)."""
        rng, limit = np.random.default_rng(self.seed), min(longest_text(config), longest)
        lengths = np.array([math.ceil(limit * share) for share in self.lengths])
        tokens = min(max(1, lengths.max()) + self.padding, limit)
        places = np.arange(tokens)[::-1] if self.mask == "left" else np.arange(tokens)
        mask = places < lengths[:, None]
        if self.mask == "none":
            mask[:] = True
        ids = np.where(mask, rng.integers(FIRST_WORD, config.vocab_size, mask.shape), config.pad_token_id)
        if self.mask == "holes":  # in the middle of the text, over words that stay
            mask &= rng.random(mask.shape) < 0.7
        batch = {"input_ids": torch.from_numpy(ids)}
        if self.mask != "none":
            batch["attention_mask"] = torch.from_numpy(mask).to(getattr(torch, self.mask_dtype))
        if self.token_types and config.type_vocab_size:
            batch["token_type_ids"] = torch.from_numpy(rng.integers(0, config.type_vocab_size, mask.shape))
        return batch


@st.composite
def texts(draw, integers_only: bool = False) -> Texts:
    shares = st.one_of(SHARES.map(lambda share: share + 0.001), st.sampled_from([0.0, 0.05, 0.3, 0.3, 0.6, 1.0]))
    return Texts(
        tuple(draw(st.lists(shares, min_size=1, max_size=9))),
        draw(st.sampled_from([0, 0, 1, 5])),
        draw(st.sampled_from(["right", "right", "left", "holes", "none"])),
        "int64" if integers_only else draw(st.sampled_from(["int64", "int64", "bool", "float32"])),
        draw(st.booleans()),
        draw(st.integers(0, 1 << 32)),
    )


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of any kind for any rule. levels: of each off-ramp a kind, a share and an offset."""

    alike: bool  # one number for all off-ramps
    one_more: bool  # a list may have a value for the final classifier
    levels: tuple[tuple[str, float, float], ...]

    def of(self, rule: str, exits: AllExits) -> float | list[float]:
        """In the units that users set. Quantiles are those of the uncertainties that occur."""
        off_ramps = exits.logits.shape[1] - 1
        if rule == "patience":
            thresholds = [self.count(level) for level in self.levels]
        else:
            values = np.array([measured(exits, rule, sample)[0] for sample in range(len(exits.logits))])
            thresholds = [
                self.level(self.levels[i], values if self.alike else values[:, i]) if i < off_ramps else 1.0
                for i in range(len(self.levels))
            ]
        if self.alike or not off_ramps:
            return thresholds[0]
        return thresholds[: off_ramps + self.one_more]

    @staticmethod
    def count(level: tuple[str, float, float]) -> float:
        kind, share, _ = level
        return {"never": math.inf, "zero": 0.0, "all": 1.0}.get(kind, 2.0 + int(2.2 * share))

    @staticmethod
    def level(level: tuple[str, float, float], values: np.ndarray) -> float:
        kind, share, offset = level
        fixed = {"never": NEVER, "zero": 0.0, "all": math.inf, "special": SPECIAL[int(2.99 * share)]}
        if kind in fixed or not values.size:
            return fixed.get(kind, 1.0)
        return float(np.quantile(values, share) + offset)


LEVEL = st.tuples(
    st.sampled_from(["quantile"] * 8 + ["special"] * 3 + ["never", "zero", "all"]),
    SHARES.map(lambda share: 0.8 * share),
    st.sampled_from([0.0, 1e-3, 1e-3, -1e-3, 1e-2, 1e-5, -1e-5, 1e-7]),
)
THRESHOLDS = st.builds(Thresholds, st.booleans(), st.booleans(), st.tuples(*[LEVEL] * 6))


def rules_of(config) -> list[str]:
    """The rules that a model can exit by. Patience comes twice: what it remembers is more that can go wrong."""
    several = config.problem_type == "multi_label_classification"
    by_labels = LABEL_RULES if several or config.num_labels > 1 else ()
    return [*by_labels, "patience", "patience"]
