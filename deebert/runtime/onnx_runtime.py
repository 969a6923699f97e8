"""Early exit in ONNX Runtime: loads what `deebert export` wrote, and answers as the PyTorch model does."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deebert.modeling.checkpoints import load_config
from deebert.modeling.classifier import HighwayClassifierOutput, token_lengths
from deebert.modeling.early_exit import HighwayPass, config_rule, set_rule, set_threshold
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, entropy, make_rule, plain_threshold
from deebert.utils.cli import InputError

FORMAT = 3  # raise it when this file can no longer run the graphs of before
MANIFEST, GRAPH = "deebert_onnx.json", "layers.onnx"
NO_IDS = np.empty((0, 0), np.int64)  # behind the first layer nobody reads them
ANSWER = ["exit_layer", "logits", "uncertainty"]


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds a graph rather than a PyTorch model."""
    return Path(folder, MANIFEST).is_file() or Path(folder, GRAPH).is_file()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For PyTorch's small steps between graphs: its threads spin after work, on the cores that ONNX Runtime needs.

    Measured on two cores in batches of 32, they made half of the saving disappear.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def open_session(path: Path, threads: int | None = None):
    """A graph, ready to run on the CPU. threads: None: as many as PyTorch has. Raises InputError."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("ONNX Runtime is missing: pip install 'deebert[onnx]', or pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base
        raise InputError(f"{path}: not a graph that ONNX Runtime can read ({error})") from None


@lru_cache
def rule_and_limits(
    name: str, num_labels: int, tolerance: float, threshold: float | tuple[float, ...], num_layers: int
) -> tuple[ExitRule, list[float], np.ndarray]:
    """A rule and its cutoffs (N-1,), as a list and as the graph takes them. Raises ValueError.

    Remembered, as a single text is answered so soon that the making of them counts.
    """
    rule = make_rule(name, num_labels, tolerance)
    cutoffs = rule.cutoffs(threshold, num_layers)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
        return rule, cutoffs, np.array(cutoffs, np.float32)


def whole_numbers(tensor: Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.int64 else tensor.long()).numpy()


class OnnxDeeBert:
    """An exported model, called like `DeeBertForSequenceClassification` in evaluation: tensors in, the same output.

    While it answers a batch, PyTorch has one thread in the whole process: servers should use processes, not threads.
    `config` holds threshold and exit rule. threads: of ONNX Runtime, None: as many as PyTorch would take.
    Raises InputError where the folder is incomplete or of another version.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: no {MANIFEST} there, so no complete export; run deebert export")
        try:
            facts = json.loads((folder / MANIFEST).read_text())
            version, form, self.precision, layers = (facts[x] for x in ("deebert", "format", "precision", "layers"))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / MANIFEST}: damaged; run deebert export anew") from None
        if form != FORMAT:
            raise InputError(
                f"{folder}: exported by version {version} (format {form}, this one reads {FORMAT}); "
                "run deebert export anew"
            )
        for name in ("config.json", GRAPH):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; the export is incomplete, run deebert export anew")
        self.rule = facts.get("exit_rule")  # by which the graph measures
        self.config = load_config(str(folder))
        if layers != self.config.num_hidden_layers:
            raise InputError(f"{folder}: {layers} layers, but a config.json of {self.config.num_hidden_layers} layers")
        self.session = open_session(folder / GRAPH, threads)
        self.has_certainty = "certainty" in [output.name for output in self.session.get_outputs()]
        if config_rule(self.config).learned and not self.has_certainty:
            raise InputError(f"{folder}: exported without --exit_rule learned, so it cannot exit by it")

    def eval(self) -> "OnnxDeeBert":
        """Nothing to do: there is no training mode. For code that is written for PyTorch models."""
        return self

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold. Raises ValueError (see `ExitRule.cutoffs`)."""
        set_threshold(self.config, value)

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule and threshold for this object; nothing is stored. Raises ValueError."""
        set_rule(self.config, name, threshold, self.has_certainty)

    def step(
        self, i: int, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layer i with the exit behind it, as `HighwayClassifier.step`."""
        everywhere = np.full(self.config.num_hidden_layers - 1, np.inf, np.float32)
        _, hidden, logits, _, *certainty = self.run(i, everywhere, inputs, attention_mask, token_type_ids)
        certainty = torch.from_numpy(certainty[0]) if certainty else None
        return torch.from_numpy(hidden), torch.from_numpy(logits), certainty

    def run(
        self,
        i: int,
        cutoffs: np.ndarray,
        inputs: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        outputs: list[str] | None = None,
    ) -> list[np.ndarray]:
        """Layer i, from 0, and those behind it, up to the first where an uncertainty is below its limit, of (N-1,).

        Inputs as for `HighwayClassifier.step`. Returns these outputs of the graph, or all (see `onnx_merge.merge`).
        """
        feed = {"attention_mask": whole_numbers(attention_mask), "limits": cutoffs}
        if i == 0:
            ids = feed["input_ids"] = whole_numbers(inputs)
            feed["token_type_ids"] = np.zeros_like(ids) if token_type_ids is None else whole_numbers(token_type_ids)
        else:
            feed |= {"layer": np.array(i), "hidden_in": inputs.numpy(), "input_ids": NO_IDS, "token_type_ids": NO_IDS}
        return self.session.run(outputs, feed)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_all_exits: bool = False,
        exit_threshold: float | Sequence[float] | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        if len(input_ids) == 0:
            raise ValueError("there is nothing to classify")
        config = self.config
        threshold = plain_threshold(config.exit_threshold if exit_threshold is None else exit_threshold)
        threshold = threshold if isinstance(threshold, float) else tuple(threshold)
        rule, cutoffs, stops = rule_and_limits(
            config.exit_rule, config.num_labels, config.patience_tolerance, threshold, config.num_hidden_layers
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        measured = rule.name == self.rule and not rule.stateful and not output_all_exits
        if measured and len(input_ids) == 1:  # leaves where the run ends
            layer, logits, uncertainty = self.run(0, stops, input_ids, mask, token_type_ids, ANSWER)
            if not math.isnan(uncertainty[0]):
                logits, uncertainty = torch.from_numpy(logits), torch.from_numpy(uncertainty)
                nats = uncertainty if rule.name == "entropy" else entropy(logits)
                exit_layer = torch.from_numpy(layer.reshape(1))
                return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=nats)
        exits = HighwayPass(rule, cutoffs, full=output_all_exits)
        return self.answer_batch(exits, stops if measured else None, input_ids, mask, token_type_ids)

    @one_torch_thread()
    def answer_batch(
        self,
        exits: HighwayPass,
        stops: np.ndarray | None,
        input_ids: Tensor,
        mask: Tensor,
        token_type_ids: Tensor | None,
    ) -> HighwayClassifierOutput:
        """Answers a batch (B, T): the graph runs until some may leave, and goes on with the others.

        stops: the cutoffs (N-1,) where the graph measures by the pass's rule; None: the rule is asked here, behind each
            layer where it wants to be.
        """
        cutoffs, measured = exits.cutoffs, stops is not None
        exits.lengths = token_lengths(mask)
        if not measured:
            stops = np.array([math.inf if exits.asks(i) else NO_EXIT for i in range(len(cutoffs))], np.float32)
        state, layer = input_ids, 0
        while layer <= len(cutoffs) and len(state):
            layer, *found = self.run(layer, stops, state, mask, token_type_ids)
            state, logits, uncertainty, certainty = (*map(torch.from_numpy, found), None)[:4]
            layer = int(layer)  # from 1, so that it is also the next one from 0
            if layer <= len(cutoffs):
                known = uncertainty if measured else None
                state, mask = exits.exit(layer - 1, logits, certainty, state, mask, known)
        logits = logits[: len(state)]  # of those who went through all layers
        all_logits = all_certainties = None
        if exits.full:
            logits, exit_layer, all_logits, all_certainties = exits.collect_all(logits)
        else:
            logits, exit_layer = exits.collect(logits)
        return HighwayClassifierOutput(
            logits=logits,
            exit_layer=exit_layer,
            entropy=entropy(logits),
            all_logits=all_logits,
            all_certainties=all_certainties,
        )
