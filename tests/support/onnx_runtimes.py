"""The ways through ONNX Runtime: with this package's host code, and as a host runs the graph that knows nothing of it.

With weights of 8 bits, what is rounded depends on all that is in the batch. So those graphs are not compared with the
brute force's logits, but with its decisions on logits of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from support.brute_force import per_off_ramp
from support.runtimes import ALWAYS, NEVER, Outcome, Trial, batch, every_exit, one_at_a_time

from deebert.runtime.exported import GRAPH
from deebert.runtime.onnx_runtime import OnnxDeeBert


@dataclass
class Export:
    """A folder with an exported model."""

    folder: Path

    @cached_property
    def runtime(self) -> OnnxDeeBert:
        return OnnxDeeBert(self.folder, threads=1)

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The graph alone."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(self.folder / GRAPH, options, providers=["CPUExecutionProvider"])

    def run(self, tensors: dict[str, torch.Tensor], cutoffs: list[float]) -> dict[str, np.ndarray]:
        """All outputs of a batch (B, T) of integers, with a cut-off for each off-ramp."""
        feed = {"token_type_ids": torch.zeros_like(tensors["input_ids"])} | tensors
        feed = {name: tensor.numpy() for name, tensor in feed.items()}
        outputs = self.session.run(None, feed | {"exit_threshold": np.array(cutoffs, np.float32)})
        return dict(zip((output.name for output in self.session.get_outputs()), outputs, strict=True))


def graph(trial: Trial, export: Export) -> Outcome:
    """model.onnx in a batch. It has one rule; that of patience it leaves to its host, and lets all or nobody exit."""
    rule, off_ramps = trial.model.config.exit_rule, trial.exits - 1
    if rule == "patience":
        rule, levels = "entropy", [ALWAYS if level == 1 else NEVER for level in levels_of(trial, "patience")]
    else:
        levels = levels_of(trial, rule)
    actual = export.run(trial.masked, levels)
    layers, logits = (torch.from_numpy(actual[name]) for name in ("exit_layer", "logits"))
    return Outcome(layers, logits, rule=rule, thresholds=[levels[:off_ramps]] * len(trial))


def levels_of(trial: Trial, rule: str) -> list[float]:
    return per_off_ramp(trial.threshold(rule), trial.exits - 1)


def graph_one_at_a_time(trial: Trial, export: Export) -> Outcome:
    outcomes = [graph(replace(trial, batch=trial.masked_rows(row)), export) for row in range(len(trial))]
    return Outcome(
        torch.cat([outcome.layers for outcome in outcomes]),
        torch.cat([outcome.logits for outcome in outcomes]),
        rule=outcomes[0].rule,
        thresholds=[outcome.thresholds[0] for outcome in outcomes],
    )


def int8_graph(trial: Trial, export: Export) -> Outcome:
    """model.onnx in a batch, against the logits with which all samples leave at one exit in the same batch."""
    actual = [
        export.run(trial.masked, [ALWAYS if j == i else NEVER for j in range(trial.exits - 1)])
        for i in range(trial.exits)
    ]
    logits = np.stack([one["logits"] for one in actual], axis=1)
    outcome = graph(trial, export)
    outcome.exits = replace(trial.reference, logits=logits)
    return outcome


def int8_one_at_a_time(trial: Trial, export: Export) -> Outcome:
    """Texts alone, against the logits of every exit of the same text alone."""
    rows = [trial.rows(row) for row in range(len(trial))]
    every = [trial.model(**row, output_all_exits=True, exit_threshold=NEVER) for row in rows]
    outcome = one_at_a_time(trial)
    logits = torch.cat([one.all_logits for one in every]).numpy()
    outcome.exits = replace(trial.reference, logits=logits)
    return outcome


def int8_batch(trial: Trial, export: Export) -> Outcome:
    """A batch that shrinks: its samples' exits have to follow from the logits that they leave with."""
    outcome = batch(trial)
    outcome.exits = replace(trial.reference, readable=np.zeros(len(trial), bool))
    return outcome


def hosted(runtime: Callable[[Trial], Outcome]) -> Callable[[Trial, Export], Outcome]:
    """A runtime for any model with exported ones; the trial's model is the host."""
    return lambda trial, export: runtime(trial)


FP32 = {
    "ONNX, batch": hosted(batch),
    "ONNX, one at a time": hosted(one_at_a_time),
    "ONNX, every exit": hosted(every_exit),
    "model.onnx alone, batch": graph,
    "model.onnx alone, one at a time": graph_one_at_a_time,
}
INT8 = {
    "int8 ONNX, batch": int8_batch,
    "int8 ONNX, one at a time": int8_one_at_a_time,
    "int8 model.onnx alone, batch": int8_graph,
}
