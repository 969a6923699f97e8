"""Early exit in ONNX Runtime: loads what `deebert export` wrote, and gives the outputs of the PyTorch model.

Steps are those of layer_runner.py: step i, from 0, ends at exit i.
Shapes: B batch, T tokens, H hidden, E exits, C labels; b samples are still active.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deebert.modeling.config import has_several_labels, set_rule, set_threshold
from deebert.modeling.config_checks import plain_threshold
from deebert.modeling.early_exit import ActiveBatch, ExitRequest, exits_of
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, make_rule, prediction_entropy
from deebert.runtime.exported import GRAPH, ExitOutput, exported_config, read_manifest
from deebert.utils.arrays import Array, to_numpy, token_lengths
from deebert.utils.errors import InputError

NO_IDS = np.empty((0, 0), np.int64)  # after the first layer the ids are not read
SINGLE_OUTPUTS = ["logits", "exit_layer"]  # what a single text needs
OUTPUTS = [*SINGLE_OUTPUTS, "hidden"]


def open_session(path: Path, threads: int | None = None):
    """A graph, ready to run on the CPU. Raises InputError.

    threads: None: OMP_NUM_THREADS, as for PyTorch; where it is not set, one for each core of the machine.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError("ONNX Runtime is missing: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or default_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base
        raise InputError(f"{path}: not a graph that ONNX Runtime can read ({error})") from None


def default_threads() -> int:
    """OMP_NUM_THREADS; 0, which is ONNX Runtime's own choice, where it is not set."""
    number = os.environ.get("OMP_NUM_THREADS", "")
    return int(number) if number.isdigit() else 0


@lru_cache
def rule_and_cutoffs(
    name: str,
    num_labels: int,
    tolerance: float,
    several_labels: bool,
    threshold: float | tuple[float, ...],
    num_exits: int,
) -> tuple[ExitRule, tuple[float, ...], np.ndarray]:
    """A rule and its cut-offs (E-1,), as numbers and as the graph takes them. Raises ValueError.

    Cached: a single text takes so little time that computing them counts.
    """
    rule = make_rule(name, num_labels, tolerance, several_labels)
    cutoffs = tuple(rule.cutoffs(threshold, num_exits))
    array = np.array(cutoffs, np.float32)
    array.setflags(write=False)
    return rule, cutoffs, array


def as_integers(array: Array | None) -> np.ndarray | None:
    """An input as the graph takes it."""
    return None if array is None else to_numpy(array).astype(np.int64, copy=False)


class GraphOutputs(NamedTuple):
    """What a run of the graph returns after the layer where it ended. See onnx_graph.merge."""

    exit_layer: int  # from 1; 0: before the first layer
    hidden: np.ndarray  # (b, T, H), after the last layer (b, 1, H)
    logits: np.ndarray  # (b, C)


class OnnxDeeBert:
    """An exported model, called like `DeeBertForSequenceClassification` in evaluation.

    Tensors in, tensors out: a `HighwayClassifierOutput`. Arrays of numpy in, arrays out: an `ExitOutput`, without
    PyTorch. All that happens between the runs of the graph is numpy's: PyTorch's threads spin after work on the cores
    that ONNX Runtime needs. Measured on two cores in batches of 32, that cost half of the time saved.
    Safe from any number of threads, as long as none sets the threshold or the rule: give them with each call.
    `config` holds threshold and exit rule. threads: of ONNX Runtime, see `open_session`.
    Raises InputError where the folder is incomplete or of another version.
    """

    device = "cpu"  # where tensors have to be

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        manifest = read_manifest(folder)
        self.precision = manifest["precision"]
        self.graph_rule = manifest["exit_rule"]  # the rule of the graph's uncertainty
        self.encoding = manifest["encoding"]  # arguments of TextEncoder
        self.config = exported_config(folder, manifest)
        self.exit_layers = self.config.exit_layers
        self.session = open_session(folder / GRAPH, threads)

    def eval(self) -> "OnnxDeeBert":
        """Nothing to do: there is no training mode. For code that is written for PyTorch models."""
        return self

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold. Raises ValueError (see `ExitRule.cutoffs`)."""
        set_threshold(self.config, value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule and threshold for this object; nothing is stored. Raises ValueError."""
        set_rule(self.config, name, threshold)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        output_all_exits: bool = False,
        exit_threshold: float | Sequence[float] | None = None,
        early_exit_entropy: float | Sequence[float] | None = None,
        exit_rule: str | None = None,
    ) -> ExitOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        if len(input_ids) == 0:
            raise ValueError("there is nothing to classify")
        threshold = early_exit_entropy if exit_threshold is None else exit_threshold
        rule, cutoffs, array = self._rule_and_cutoffs(threshold, exit_rule)
        ids, mask, types = map(as_integers, (input_ids, attention_mask, token_type_ids))
        mask = np.ones_like(ids) if mask is None else mask
        if output_all_exits:
            output = self._run_all_exits(rule, cutoffs, ids, mask, types)
        elif rule.name != self.graph_rule or rule.stateful:
            output = self._run_batch(rule, cutoffs, None, ids, mask, types)
        elif len(ids) == 1:
            output = self._run_single(array, ids, mask, types)
        else:
            output = self._run_batch(rule, cutoffs, array, ids, mask, types)
        if isinstance(input_ids, np.ndarray):
            return output
        from deebert.runtime.layer_runner import as_tensors  # PyTorch is here, since its tensors are

        return as_tensors(output)

    def run(
        self,
        i: int,
        cutoffs: np.ndarray,
        inputs: np.ndarray,
        attention_mask: np.ndarray,
        token_type_ids: np.ndarray | None = None,
    ) -> GraphOutputs:
        """Runs the steps from i to the first where a sample exits by these cut-offs (E-1,).

        inputs: ids (b, T) where i is 0, else hidden states (b, T, H).
        """
        outputs = self._run_graph(i, cutoffs, inputs, attention_mask, token_type_ids, stop_at_first=True)
        logits, exit_layer, hidden = outputs
        return GraphOutputs(int(exit_layer[0]), hidden, logits)

    def _run_graph(
        self,
        i: int,
        cutoffs: np.ndarray,
        inputs: np.ndarray,
        mask: np.ndarray,
        types: np.ndarray | None,
        outputs: list[str] | None = None,
        stop_at_first: bool = False,
    ) -> list[np.ndarray]:
        """The outputs of these names, or all, as ONNX Runtime returns them. stop_at_first: see `onnx_graph.merge`."""
        # an export of 0.10 may have more outputs than these
        feed = {"attention_mask": mask, "exit_threshold": cutoffs}
        if stop_at_first:
            feed["stop_at_first"] = np.array(True)
        if i == 0:
            feed |= {"input_ids": inputs, "token_type_ids": np.zeros_like(inputs) if types is None else types}
        else:
            feed |= {"layer": np.array(i), "hidden_in": inputs, "input_ids": NO_IDS, "token_type_ids": NO_IDS}
        return self.session.run(outputs or OUTPUTS, feed)

    def _run_single(
        self, cutoffs: np.ndarray, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None
    ) -> ExitOutput:
        """One text is one run of the graph, which ends where the text exits."""
        logits, exit_layer = self._run_graph(0, cutoffs, ids, mask, types, SINGLE_OUTPUTS)
        return ExitOutput(logits, exit_layer, self._entropy(logits))

    def _run_batch(
        self,
        rule: ExitRule,
        cutoffs: Sequence[float],
        stops: np.ndarray | None,
        ids: np.ndarray,
        mask: np.ndarray,
        types: np.ndarray | None,
    ) -> ExitOutput:
        """A batch (B, T): the graph stops at the first layer where a sample may exit; the others resume from there.

        stops: the cut-offs (E-1,) where the graph has this rule; None: it stops after each layer that the rule
            consults.
        """
        if stops is None:
            consulted = [rule.consults(cutoffs, i) for i in range(len(cutoffs))]
            stops = np.where(consulted, np.float32(math.inf), np.float32(NO_EXIT))
        batch = ActiveBatch(np.arange(len(ids)), token_lengths(mask), ids, mask)
        request, i = ExitRequest(batch, rule, cutoffs, self.exit_layers), 0  # the step with which the next run begins
        while len(batch):
            outputs = self.run(i, stops, batch.hidden_states, batch.attention_mask, types)
            layer, batch.hidden_states = outputs.exit_layer, outputs.hidden
            if layer == self.exit_layers[-1]:
                request.exited.add(batch.index, outputs.logits, layer)
                break
            i = self.exit_layers.index(layer)
            request.let_exit(i, outputs.logits)
            i += 1
        logits, exit_layer = request.exited.in_input_order()
        return ExitOutput(logits, exit_layer, self._entropy(logits))

    def _run_all_exits(
        self, rule: ExitRule, cutoffs: Sequence[float], ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None
    ) -> ExitOutput:
        """Every layer and every exit for every sample; where each would exit follows from that."""
        state, exits = ids, []  # of each exit the logits (b, C)
        for i in range(len(self.exit_layers)):
            outputs = self.run(i, self._stop_everywhere(), state, mask, types)
            state = outputs.hidden
            exits.append(outputs.logits)
        all_logits = np.stack(exits, axis=1)
        logits, exit_layer = exits_of(all_logits, rule, cutoffs, self.exit_layers)
        return ExitOutput(logits, exit_layer, self._entropy(logits), all_logits)

    def _entropy(self, logits: np.ndarray) -> np.ndarray:
        return prediction_entropy(logits, has_several_labels(self.config))

    def _stop_everywhere(self) -> np.ndarray:
        return np.full(len(self.exit_layers) - 1, np.inf, np.float32)

    def _rule_and_cutoffs(
        self, threshold: float | Sequence[float] | None, exit_rule: str | None
    ) -> tuple[ExitRule, tuple[float, ...], np.ndarray]:
        config = self.config
        threshold = plain_threshold(config.exit_threshold if threshold is None else threshold)
        key = threshold if isinstance(threshold, float) else tuple(threshold)
        rule, several = exit_rule or config.exit_rule, has_several_labels(config)
        exits = len(self.exit_layers)
        return rule_and_cutoffs(rule, config.num_labels, config.patience_tolerance, several, key, exits)
