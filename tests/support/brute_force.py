"""Early exit by brute force: what every runtime has to agree with. Nothing here is imported from deebert.

The hidden states are those of Hugging Face's own classes with copied weights, on full batches, in float64 (bfloat16
for models in bfloat16), with sdpa attention: the eager one gives NaN for padding in ModernBERT's windows. Poolings,
heads and rules are written out in numpy, and decisions are taken for one sample after the other.

Shapes: B samples, T tokens, H hidden, E exits, of which E-1 are off-ramps, C labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

STOCK = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
}
ROBERTA_HEAD = {"classifier.": "classifier.out_proj.", "roberta.pooler.dense.": "classifier.dense."}
OWN_WEIGHTS = (".highway.", ".highway_embeddings.")
LABEL_RULES = ("entropy", "confidence")  # they read one off-ramp's probabilities


@dataclass
class AllExits:
    """What every exit says about every sample, and what a config says about exits.

    logits: (B, E, C). constant: (E-1,) whether an off-ramp gives all texts the same logits, without a rounding error:
    its weights are zero.
    readable: (B,) whether what exits read of a sample has a meaning, see `readable`.
    """

    logits: NDArray
    constant: NDArray
    several_labels: bool
    tolerance: float
    readable: NDArray


@dataclass
class Decisions:
    """What a rule decides at every off-ramp.

    exits: (B, E-1) whether a sample that got there exits. slack: (B, E-1) the rounding error that turns this decision;
    infinite where no rounding can.
    """

    exits: NDArray
    slack: NDArray

    def path(self, sample: int) -> int:
        """The exit, from 0, of a sample: the first off-ramp that lets it exit, else the final classifier."""
        return [*self.exits[sample].tolist(), True].index(True)


class BruteForce:
    """A model, as its config and its weights (by their names in a checkpoint) describe it."""

    def __init__(self, facts: Mapping, weights: Mapping[str, torch.Tensor], dtype: torch.dtype):
        self.facts = facts
        self.linear_mean = facts["classifier_pooling"] == "mean" and facts["model_type"] != "modernbert"
        self.stock = stock_model(facts, weights, dtype, without_head=self.linear_mean)
        self.weights = {name: tensor.double().numpy() for name, tensor in weights.items()}
        self.layers = self.stock.config.num_hidden_layers
        names = [f".highway.{i}." for i in range(self.layers - 1)]
        self.off_ramps = [".highway_embeddings.", *names] if facts["exit_before_first_layer"] else names

    def all_exits(self, batch: Mapping[str, torch.Tensor]) -> AllExits:
        """The logits of all exits for a batch of input_ids, attention_mask and, perhaps, token_type_ids (B, T)."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).numpy() != 0
        integers = {"attention_mask": torch.from_numpy(mask).long()}  # HF's ModernBERT takes no other in bfloat16
        with torch.no_grad():
            output = self.stock(**{**batch, **integers}, output_hidden_states=True)
        states = [state.double().numpy() for state in output.hidden_states]
        states = states[0 if self.facts["exit_before_first_layer"] else 1 : self.layers]
        pooled = [
            np.stack([self.pool(tokens, real) for tokens, real in zip(state, mask, strict=True)]) for state in states
        ]
        logits = [self.classify(state, ramp) for state, ramp in zip(pooled, self.off_ramps, strict=True)]
        final = output.logits.double().numpy()
        if self.linear_mean:
            pairs = zip(output.hidden_states[-1].double().numpy(), mask, strict=True)
            final = np.stack([mean_of(tokens, real) for tokens, real in pairs]) @ self.weights["classifier.weight"].T
            final += self.weights["classifier.bias"]
        logits = [*logits, final]
        return AllExits(
            np.stack(logits, axis=1),
            np.array([not self.weight(f"{ramp}classifier.weight").any() for ramp in self.off_ramps], bool),
            self.facts["problem_type"] == "multi_label_classification",
            self.facts["patience_tolerance"],
            self.readable(mask),
        )

    def readable(self, mask: NDArray) -> NDArray:
        """(B, T) -> (B,): attention to nothing has no defined result. So nothing is known of rows of padding only.

        Nor is it of ModernBERT's first token where it and its window are padding: Hugging Face's eager gives NaN.
        """
        first = "first" in self.facts["highway_pooling"] or self.facts.get("classifier_pooling") == "cls"
        if self.facts["model_type"] == "modernbert" and first:
            mask = mask[:, : self.stock.config.sliding_window + 1]
        return mask.any(axis=1)

    def weight(self, ending: str) -> NDArray:
        (weight,) = [array for name, array in self.weights.items() if name.endswith(ending)]
        return weight

    def pool(self, tokens: NDArray, real: NDArray) -> NDArray:
        """What an off-ramp reads of the hidden states (T, H) of one sample, of which `real` (T,) are no padding."""
        state = tokens[0] if self.facts["highway_pooling"] == "first" else mean_of(tokens, real)
        if self.facts["model_type"] != "modernbert":
            return state
        return (state - state.mean()) / math.sqrt(state.var() + 1e-5)  # its layers do not normalise what they give

    def classify(self, state: NDArray, ramp: str) -> NDArray:
        """Pooled states (B, H) -> logits (B, C)."""
        if self.facts["highway_head"] == "pooler":
            weight, bias = (self.weight(f"{ramp}pooler.dense.{kind}") for kind in ("weight", "bias"))
            state = np.tanh(state @ weight.T + bias)
        return state @ self.weight(f"{ramp}classifier.weight").T + self.weight(f"{ramp}classifier.bias")


def mean_of(tokens: NDArray, real: NDArray) -> NDArray:
    """(T, H) -> (H,). Whatever is read of padding only has no meaning."""
    return tokens[real].mean(axis=0) if real.any() else np.zeros(tokens.shape[1])


def stock_model(facts: Mapping, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, without_head: bool):
    """Hugging Face's own class with these weights, all of them and no others but those of the off-ramps.

    without_head: the final classifier is not HF's head, which stays random here.
    """
    model_class = getattr(transformers, f"{STOCK[facts['model_type']]}ForSequenceClassification")
    config = model_class.config_class(
        **{**facts, "attn_implementation": "sdpa" if model_class._supports_sdpa else "eager"}
    )
    plain = {name: tensor for name, tensor in weights.items() if not any(own in name for own in OWN_WEIGHTS)}
    if facts["model_type"] == "roberta":  # here the checkpoint has the pooler and the classifier of BERT
        for ours, theirs in ROBERTA_HEAD.items():
            plain = {theirs + n.removeprefix(ours) if n.startswith(ours) else n: w for n, w in plain.items()}
    model = model_class(config).to(dtype).eval()
    if without_head:
        plain = {name: tensor for name, tensor in plain.items() if "classifier." not in name}
        head = {name for name in model.state_dict() if "classifier." in name or ".pooler." in name}
        assert plain.keys() == model.state_dict().keys() - head
    model.load_state_dict(plain, strict=not without_head)
    return model


def softmax(scores: NDArray) -> NDArray:
    """(C,) -> (C,)."""
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def uncertainty(rule: str, logits: NDArray, several_labels: bool) -> float:
    """Of one prediction with logits (C,), by a rule of LABEL_RULES."""
    if several_labels:  # each label is a prediction of no or yes, and the least certain one counts
        return max(uncertainty(rule, np.array([0.0, score]), False) for score in logits)
    shares = softmax(logits)
    return 1 - max(shares) if rule == "confidence" else -sum(p * math.log(p) for p in shares if p > 0)


def decide(exits: AllExits, rule: str, thresholds: Sequence[Sequence[float]]) -> Decisions:
    """What the rule decides. thresholds: (B, E-1) of each sample, in the units that users set."""
    shape = exits.logits.shape[0], exits.logits.shape[1] - 1
    decisions = Decisions(np.zeros(shape, bool), np.full(shape, math.inf))
    for sample, own in enumerate(thresholds):
        measure = patience if rule == "patience" else measured
        values, errors = measure(exits, rule, sample)
        for i, threshold in enumerate(own):
            if threshold <= 0:
                continue
            if rule == "patience":
                decisions.exits[sample, i] = values[i] >= threshold
                decisions.slack[sample, i] = errors[i]
            elif math.isinf(threshold):
                decisions.exits[sample, i] = True
            else:
                decisions.exits[sample, i] = values[i] < threshold
                decisions.slack[sample, i] = math.inf if errors[i] == 0 else abs(values[i] - threshold)
    return decisions


def measured(exits: AllExits, rule: str, sample: int) -> tuple[list[float], list[float]]:
    """The uncertainties (E-1,) of a sample, and (E-1,) 0 where they have no rounding error, else 1."""
    values, errors = [], []
    for i, constant in enumerate(exits.constant):
        values.append(uncertainty(rule, exits.logits[sample, i], exits.several_labels))
        known = constant and rule == "confidence"
        errors.append(0 if known and values[-1] in (0.5, 0.75, 1.0) else 1)  # sums of powers of two
    return values, errors


def patience(exits: AllExits, _: str, sample: int) -> tuple[list[int], list[float]]:
    """How many off-ramps in a row agree (E-1,), and the rounding error that changes one of these counts."""
    labels, regression = exits.logits.shape[2], exits.logits.shape[2] == 1 and not exits.several_labels
    count, before = [0] * (labels if exits.several_labels else 1), None
    counts, errors, smallest = [], [], math.inf
    for i, constant in enumerate(exits.constant):
        logits = exits.logits[sample, i]
        exact = bool(constant)
        if regression:
            agree = [before is not None and abs(logits[0] - before[0]) <= exits.tolerance]
            exact = exact and i > 0 and bool(exits.constant[i - 1])
            gap = abs(abs(logits[0] - before[0]) - exits.tolerance) if i > 0 else math.inf
            before = logits
        else:
            said = list(logits > 0) if exits.several_labels else [int(logits.argmax())]
            agree = [before is not None and one == other for one, other in zip(said, before or said, strict=True)]
            top = np.sort(logits)
            gap = float(np.abs(logits).min() if exits.several_labels else top[-1] - top[-2])
            before = said
        count = [1 + n * same for n, same in zip(count, agree, strict=False)]
        smallest = min(smallest, math.inf if exact else gap)
        counts.append(min(count))
        errors.append(smallest)
    return counts, errors


def per_off_ramp(threshold: float | Sequence[float], off_ramps: int) -> list[float]:
    """One number for all, or one for each; one more is allowed and has no meaning."""
    return [threshold] * off_ramps if isinstance(threshold, int | float) else list(threshold[:off_ramps])
