"""Early exit in ONNX Runtime: loads what `deebert export` wrote, and gives the outputs of the PyTorch model.

Steps are those of layer_runner.py: step i, from 0, ends at exit i.
Shapes: B batch, T tokens, H hidden, E exits, C labels; b samples are still active.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deebert.modeling.checkpoints import GRAPH, MANIFEST, check_graph, load_config
from deebert.modeling.classifier import HighwayClassifierOutput, output_of_all_exits
from deebert.modeling.config import config_rule, has_several_labels, set_rule, set_threshold
from deebert.modeling.early_exit import ActiveBatch, ExitedSamples, let_exit
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, make_rule, plain_threshold, prediction_entropy
from deebert.modeling.off_ramps import token_lengths
from deebert.utils.cli import InputError

FORMAT = 4  # raise it when this file can no longer run the graphs of before
NO_IDS = np.empty((0, 0), np.int64)  # after the first layer the ids are not read
SINGLE_OUTPUTS = ["logits", "exit_layer"]  # what a single text needs


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


def read_manifest(folder: Path) -> dict:
    """What an export says about itself. Raises InputError where the folder is incomplete or of another version."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no {MANIFEST} there, so no complete export; run deebert export")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, file_format = manifest["deebert"], manifest["format"]
        _ = manifest["precision"], manifest["layers"], manifest["exit_rule"], manifest["config"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / MANIFEST}: damaged; run deebert export again") from None
    if file_format != FORMAT:
        raise InputError(
            f"{folder}: exported by version {version} (format {file_format}, this one reads {FORMAT}); "
            "run deebert export again"
        )
    for name in ("config.json", GRAPH):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; the export is incomplete, run deebert export again")
    return manifest


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
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
        array = np.array(cutoffs, np.float32)
    array.setflags(write=False)
    return rule, cutoffs, array


class GraphOutputs(NamedTuple):
    """What a run of the graph returns after the layer where it ended. See onnx_graph.merge."""

    exit_layer: int  # from 1; 0: before the first layer
    hidden: np.ndarray  # (b, T, H), after the last layer (b, 1, H)
    logits: Tensor  # (b, C)
    certainty: Tensor | None = None  # (b,)


def int64(tensor: Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.int64 else tensor.long()).numpy()


class OnnxDeeBert:
    """An exported model, called like `DeeBertForSequenceClassification` in evaluation: tensors in, the same output.

    Hidden states are numpy arrays between the graphs: PyTorch would copy them with several threads, which spin after
    work on the cores that ONNX Runtime needs. Measured on two cores in batches of 32, that cost half of the time saved.
    Safe from any number of threads, as long as none sets the threshold or the rule: give them with each call.
    `config` holds threshold and exit rule. threads: of ONNX Runtime, None: as many as PyTorch has.
    Raises InputError where the folder is incomplete or of another version.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        manifest = read_manifest(folder)
        self.precision = manifest["precision"]
        self.graph_rule = manifest["exit_rule"]  # the rule of the graph's uncertainty
        self.config = load_config(str(folder))
        self.exit_layers = self.config.exit_layers
        if manifest["layers"] != self.exit_layers[-1]:
            raise InputError(
                f"{folder}: {manifest['layers']} layers, but a config.json of {self.exit_layers[-1]} layers; "
                "run deebert export again"
            )
        check_graph(folder, manifest, self.config)
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

    set_early_exit_entropy = set_exit_threshold  # the original's name

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule and threshold for this object; nothing is stored. Raises ValueError."""
        set_rule(self.config, name, threshold, self.has_certainty)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_all_exits: bool = False,
        exit_threshold: float | Sequence[float] | None = None,
        early_exit_entropy: float | Sequence[float] | None = None,
        exit_rule: str | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        if len(input_ids) == 0:
            raise ValueError("there is nothing to classify")
        threshold = early_exit_entropy if exit_threshold is None else exit_threshold
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rule, cutoffs, array = self._rule_and_cutoffs(threshold, exit_rule)
        rule.check_head(self.has_certainty)
        if output_all_exits:
            return self._run_all_exits(rule, cutoffs, input_ids, mask, token_type_ids)
        in_graph = rule.name == self.graph_rule and not rule.stateful
        if in_graph and len(input_ids) == 1:
            return self._run_single(rule, array, input_ids, mask, token_type_ids)
        return self._run_batch(rule, cutoffs, array if in_graph else None, input_ids, mask, token_type_ids)

    def step(
        self,
        i: int,
        inputs: Tensor | np.ndarray,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        consult: bool = True,
    ) -> tuple[np.ndarray, Tensor | None, Tensor | None]:
        """Step i with the exit after it, see `layer_runner.LayerSteps.step`.

        The graph cannot end after a layer whose off-ramp does not run, so `consult` makes no difference here.
        """
        outputs = self.run(i, self._stop_everywhere(), inputs, attention_mask, token_type_ids)
        return outputs.hidden, outputs.logits, outputs.certainty

    def run(
        self,
        i: int,
        cutoffs: np.ndarray,
        inputs: Tensor | np.ndarray,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> GraphOutputs:
        """Runs the steps from i to the first where a sample exits by these cut-offs (E-1,). Inputs as for `step`."""
        outputs = self._run_graph(i, cutoffs, inputs, attention_mask, token_type_ids, stop_at_first=True)
        logits, exit_layer, *others, hidden = outputs
        return GraphOutputs(int(exit_layer[0]), hidden, *map(torch.from_numpy, (logits, *others)))

    def _run_graph(
        self,
        i: int,
        cutoffs: np.ndarray,
        inputs: Tensor | np.ndarray,
        mask: Tensor,
        token_type_ids: Tensor | None,
        outputs: list[str] | None = None,
        stop_at_first: bool = False,
    ) -> list[np.ndarray]:
        """The outputs of these names, or all, as ONNX Runtime returns them. stop_at_first: see `onnx_graph.merge`."""
        feed = {"attention_mask": int64(mask), "exit_threshold": cutoffs}
        if stop_at_first:
            feed["stop_at_first"] = np.array(True)
        if i == 0:
            ids = feed["input_ids"] = int64(inputs)
            feed["token_type_ids"] = np.zeros_like(ids) if token_type_ids is None else int64(token_type_ids)
        else:
            feed |= {"layer": np.array(i), "hidden_in": inputs, "input_ids": NO_IDS, "token_type_ids": NO_IDS}
        return self.session.run(outputs, feed)

    def _run_single(
        self, rule: ExitRule, cutoffs: np.ndarray, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor | None
    ) -> HighwayClassifierOutput:
        """One text is one run of the graph, which ends where the text exits."""
        outputs = self._run_graph(0, cutoffs, input_ids, mask, token_type_ids, SINGLE_OUTPUTS)
        logits, exit_layer = map(torch.from_numpy, outputs)
        in_nats = rule if rule.name == "entropy" else config_rule(self.config, "entropy")
        nats, _ = in_nats.uncertainty_alone(logits, None, None)
        return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=torch.tensor([nats]))

    def _run_batch(
        self,
        rule: ExitRule,
        cutoffs: Sequence[float],
        stops: np.ndarray | None,
        input_ids: Tensor,
        mask: Tensor,
        token_type_ids: Tensor | None,
    ) -> HighwayClassifierOutput:
        """A batch (B, T): the graph stops at the first layer where a sample may exit; the others resume from there.

        stops: the cut-offs (E-1,) where the graph has this rule; None: it stops after each layer that the rule
            consults.
        """
        if stops is None:
            consulted = [rule.consults(cutoffs, i) for i in range(len(cutoffs))]
            stops = np.where(consulted, np.float32(math.inf), np.float32(NO_EXIT))
        batch = ActiveBatch(torch.arange(len(input_ids)), token_lengths(mask), input_ids, mask)
        exited, i = ExitedSamples(), 0  # the step with which the next run begins
        while len(batch):
            outputs = self.run(i, stops, batch.hidden_states, batch.attention_mask, token_type_ids)
            layer, batch.hidden_states = outputs.exit_layer, outputs.hidden
            if layer == self.exit_layers[-1]:
                exited.add(batch.index, outputs.logits, layer)
                break
            uncertainty, batch.rule_state = rule.uncertainty(outputs.logits, outputs.certainty, batch.rule_state)
            stopped = self.exit_layers.index(layer)
            let_exit(batch, exited, layer, outputs.logits, uncertainty, cutoffs[stopped])
            i = stopped + 1
        logits, exit_layer = exited.in_input_order()
        return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=self._entropy(logits))

    def _run_all_exits(
        self,
        rule: ExitRule,
        cutoffs: Sequence[float],
        input_ids: Tensor,
        mask: Tensor,
        token_type_ids: Tensor | None,
    ) -> HighwayClassifierOutput:
        """Every layer and every exit for every sample; where each would exit follows from that."""
        state, exits = input_ids, []
        for i in range(len(self.exit_layers)):
            outputs = self.run(i, self._stop_everywhere(), state, mask, token_type_ids)
            state = outputs.hidden
            exits.append((outputs.logits, outputs.certainty))
        output = output_of_all_exits(exits, rule, cutoffs, self.exit_layers)
        output.entropy = self._entropy(output.logits)
        return output

    def _entropy(self, logits: Tensor) -> Tensor:
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
