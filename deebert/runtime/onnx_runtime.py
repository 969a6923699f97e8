"""Early exit in ONNX Runtime: loads what `deebert export` wrote, and gives the outputs of the PyTorch model.

Steps are those of onnx_export.py: step i, from 0, ends at exit i.
Shapes: B batch, T tokens, H hidden, E exits, C labels; b samples are still active.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deebert.modeling.config import ThresholdSetters, config_cutoffs, has_several_labels
from deebert.modeling.early_exit import ActiveBatch, ExitRequest, exits_of
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, prediction_entropy
from deebert.runtime.exported import GRAPH, ExitOutput, exported_config, read_manifest
from deebert.utils.arrays import Array, to_numpy, token_lengths
from deebert.utils.errors import InputError

STOP = np.array(True)
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
    number = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = threads or (int(number) if number.isdigit() else 0)  # 0: ONNX Runtime's own choice
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base
        raise InputError(f"{path}: not a graph that ONNX Runtime can read ({error})") from None


class OnnxDeeBert(ThresholdSetters):
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
        rule, cutoffs = config_cutoffs(self.config, threshold, exit_rule)
        given = (input_ids, attention_mask, token_type_ids)
        ids, mask, types = (None if x is None else to_numpy(x).astype(np.int64, copy=False) for x in given)
        mask, types = np.ones_like(ids) if mask is None else mask, np.zeros_like(ids) if types is None else types
        if output_all_exits:
            all_logits = self._all_exits(ids, mask, types)
            logits, exit_layer = exits_of(all_logits, rule, cutoffs, self.exit_layers)
        else:
            all_logits, (logits, exit_layer) = None, self._with_exits(rule, cutoffs, ids, mask, types)
        entropy = prediction_entropy(logits, has_several_labels(self.config))
        output = ExitOutput(logits, exit_layer, entropy, all_logits)
        if isinstance(input_ids, np.ndarray):
            return output
        from torch import from_numpy  # PyTorch is here, since its tensors are

        from deebert.modeling.classifier import HighwayClassifierOutput

        arrays = {name: array for name, array in vars(output).items() if array is not None}
        return HighwayClassifierOutput(**{name: from_numpy(array) for name, array in arrays.items()})

    def _with_exits(
        self, rule: ExitRule, cutoffs: Sequence[float], ids: np.ndarray, mask: np.ndarray, types: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (B, C) and exit layers (B,) of a batch (B, T).

        A single text is one run of the graph, which ends where the text exits. In a batch a run stops at the first
        layer where a sample may exit, and the next one resumes there with those that are still active.
        """
        if rule.name == self.graph_rule and not rule.stateful:
            stops = np.array(cutoffs, np.float32)
            if len(ids) == 1:
                logits, exit_layer = self._run_graph(0, stops, ids, mask, types, SINGLE_OUTPUTS)
                return logits, exit_layer
        else:  # the graph does not know this rule, and stops after each layer that the rule consults
            consulted = [rule.consults(cutoffs, i) for i in range(len(cutoffs))]
            stops = np.where(consulted, np.float32(math.inf), np.float32(NO_EXIT))
        batch = ActiveBatch(np.arange(len(ids)), token_lengths(mask), ids, mask)
        request, i = ExitRequest(batch, rule, cutoffs, self.exit_layers), 0  # the step with which the next run begins
        while len(batch):
            outputs = self._run_graph(i, stops, batch.hidden_states, batch.attention_mask, types)
            logits, layers, batch.hidden_states = outputs
            i = self.exit_layers.index(int(layers[0]))
            if i == len(cutoffs):
                request.exited.add(batch.index, logits, self.exit_layers[i])
                break
            request.let_exit(i, logits)
            i += 1
        return request.exited.in_input_order()

    def _all_exits(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        """The logits (B, E, C) of every exit for every sample: each run of the graph stops after one layer."""
        state, exits = ids, []
        everywhere = np.full(len(self.exit_layers) - 1, np.inf, np.float32)
        for i in range(len(self.exit_layers)):
            logits, _, state = self._run_graph(i, everywhere, state, mask, types)
            exits.append(logits)
        return np.stack(exits, axis=1)

    def _run_graph(
        self, i: int, cutoffs: np.ndarray, inputs: np.ndarray, mask: np.ndarray, types: np.ndarray, outputs=OUTPUTS
    ) -> list[np.ndarray]:
        """Runs the graph from step i to the first layer where a sample exits by these cut-offs (E-1,).

        inputs: ids (b, T) where i is 0, else hidden states (b, T, H). Returns the outputs of these names, of that layer
        (see `onnx_graph.merge`).
        """
        feed = {"attention_mask": mask, "exit_threshold": cutoffs, "stop_at_first": STOP}
        if i == 0:
            feed |= {"input_ids": inputs, "token_type_ids": types}
        else:
            feed |= {"layer": np.array(i), "hidden_in": inputs, "input_ids": NO_IDS, "token_type_ids": NO_IDS}
        return self.session.run(outputs, feed)
