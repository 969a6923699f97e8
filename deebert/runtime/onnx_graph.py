"""One ONNX graph of a model's parts, which runs layer after layer until all samples have exited.

Each layer lies in an If inside the previous layer's branch. Samples that have exited run on with the others, and on the
way out of the branches each one gets the logits of its first exit: so the results are correct for batches of any size
in every program that runs the graph. onnx_runtime.py is faster in batches: it has the graph stop at the first exit of
any sample, and resumes it there with the samples that are still active; a run may begin at any layer.

One session serves all layers, and its threads stay awake from one to the next; a session for each layer wakes them
again each time, which costs a quarter of a small model's time. A Loop over layers is 6 % slower than nested Ifs.

Step i, from 0, ends at exit i (see onnx_export.py). This is the one place that repeats the decision of
modeling/early_exit.py; the parity tests hold the two together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from deebert.modeling.config import config_rule
from deebert.modeling.exit_rules import NO_EXIT

MOST_EXITS = 32  # readers of protobuf, and so of ONNX, take messages within messages a hundred deep
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
OUTPUTS = ["logits", "exit_layer", "hidden"]  # of a run, see `merge`
CARRIED = ["hidden", "logits", "exited", "stop"]  # what a step hands on
SHARED = {name: name for name in ("attention_mask", "token_type_ids", "mask", "pooling_weights")}


@dataclass(frozen=True)
class Parts:
    """The graphs of a model's parts; E exits, b samples, T tokens, H hidden, C labels.

    masks: attention_mask (b, T) -> mask (b, 1, 1, T) and, where off-ramps need it, pooling_weights (b, T).
    layers: (E,) of each step: inputs, token ids (b, T) of the first, hidden states (b, T, H) of others, mask, and
        token_type_ids (b, T) of the first -> hidden (b, T, H), of the last (b, 1, H).
    exits: (E,) hidden and, where they need it, pooling_weights -> logits (b, C), and the uncertainty (b,) by the
        model's exit rule (of a stateful one as if there were no state).
    exit_layers: (E,) the layer of each exit.
    """

    masks: ModelProto
    layers: Sequence[ModelProto]
    exits: Sequence[ModelProto]
    exit_layers: Sequence[int]

    @classmethod
    def load(cls, folder: Path, exit_layers: Sequence[int]) -> "Parts":
        """As onnx_export.export_parts writes them."""
        layers = [onnx.load(folder / f"layer_{i}.onnx") for i in range(len(exit_layers))]
        exits = [onnx.load(folder / f"exit_{i}.onnx") for i in range(len(exit_layers))]
        return cls(onnx.load(folder / "masks.onnx"), layers, exits, exit_layers)

    def __iter__(self) -> Iterator[ModelProto]:
        return iter([self.masks, *self.layers, *self.exits])

    @property
    def last(self) -> int:
        """The last step, from 0."""
        return len(self.layers) - 1


def merge(folder: Path, config, path: Path) -> None:
    """Writes one graph of all parts in a folder, of a model of that config, which has at most MOST_EXITS exits.

    Inputs: input_ids, token_type_ids and attention_mask, (b, T) int64. They suffice to run the model at its stored
    threshold. Optional inputs:
        exit_threshold (1,) or (E-1,): cut-offs, one for all off-ramps or one for each. An off-ramp whose cut-off is 0
            or less does not run. A graph of a stateful rule (patience) exits where the cut-off is infinite only.
        layer () int64: the step, from 0, with which to begin; 0 if not given.
        hidden_in (b, T, H): the previous step's hidden states where layer > 0; the ids may be empty then.
        stop_at_first () bool: the run ends at the first exit of any sample; else it ends when all have exited.
    Outputs:
        logits (b, C): of each sample's own exit. exit_layer (b,) int64: from 1; 0: before the first layer. Samples that
            have not exited get those of the exit where the run ended.
        hidden (b, T, H), after the last layer (b, 1, H): of the layer where the run ended.
    """
    parts = Parts.load(folder, config.exit_layers)
    nodes, tensors = with_prefix(parts.masks, "masks")
    nodes.append(make_node("Add", ["exit_threshold", "zeros"], ["cutoffs"]))  # one number for all becomes one for each
    tensors += [
        make_tensor("zeros", FLOAT, [parts.last], [0.0] * parts.last),
        make_tensor("nobody", BOOL, [1, 1], [False]),
        scalar("no", BOOL, False),
        make_tensor("no_logits", FLOAT, [1, config.num_labels], [0.0] * config.num_labels),
    ]
    more_nodes, more_tensors = result_nodes(parts)
    nodes += more_nodes
    tensors += more_tensors
    ids = ("input_ids", "token_type_ids", "attention_mask")  # sizes of their own: what is not read may be empty
    inputs = [make_tensor_value_info(name, INT64, [f"{name}_b", f"{name}_t"]) for name in ids]
    rule = config_rule(config)
    cutoffs = rule.cutoffs(NO_EXIT if rule.stateful else config.exit_threshold, len(config.exit_layers))
    for name, kind, shape, default in (
        ("exit_threshold", FLOAT, ["off_ramps"], make_tensor("", FLOAT, [len(cutoffs)], cutoffs)),
        ("layer", INT64, [], scalar("", INT64, 0)),
        ("hidden_in", FLOAT, ["hidden_in_b", "hidden_in_t", config.hidden_size], None),
        ("stop_at_first", BOOL, [], scalar("", BOOL, False)),
    ):
        inputs.append(make_tensor_value_info(name, kind, shape))
        tensors.append(default or make_tensor("", kind, [0, 0, config.hidden_size], []))
        tensors[-1].name = name
    shapes = {"hidden": ["b", "t", config.hidden_size], "logits": ["b", config.num_labels]}
    kinds = {"exit_layer": INT64}
    outputs = [make_tensor_value_info(x, kinds.get(x, FLOAT), shapes.get(x, ["b"])) for x in OUTPUTS]
    opsets = {"": 20}  # from 20 on, ReduceMin takes bools; older exporters write less
    for opset in (opset for part in parts for opset in part.opset_import):
        opsets[opset.domain] = max(opset.version, opsets.get(opset.domain, 0))
    model = make_model(
        make_graph(nodes, "deebert", inputs, outputs, initializer=tensors),
        opset_imports=[make_opsetid(*opset) for opset in sorted(opsets.items())],
        ir_version=max(part.ir_version for part in parts),
    )
    onnx.save(model, path)


def result_nodes(parts: Parts) -> tuple[list[NodeProto], list[TensorProto]]:
    """The run, and its outputs. Exit layers come as (b, 1), or (1, 1) where all samples exit at the same one."""
    run = steps_from(parts, 0)
    nodes, outputs = [*run.node], dict(zip(OUTPUTS, (x.name for x in run.output), strict=True))
    nodes.append(make_node("Shape", [outputs["logits"]], ["batch_size"], start=0, end=1))
    nodes.append(make_node("Reshape", [outputs.pop("exit_layer"), "flat"], ["exit_layers"]))
    nodes.append(make_node("Expand", ["exit_layers", "batch_size"], ["exit_layer"]))
    nodes += [make_node("Identity", [x], [name]) for name, x in outputs.items()]
    return nodes, [*run.initializer, make_tensor("flat", INT64, [1], [-1])]


def steps_from(parts: Parts, i: int) -> GraphProto:
    """Runs step i, unless the run begins after it, and the following ones, until the run ends."""
    label, step = f"level_{i}", step_and_exit(parts, i)
    if i == parts.last:
        end = end_subgraph(parts, i, step.output)
        tensors = [*step.initializer, *end.initializer]
        return make_graph([*step.node, *end.node], label, [], end.output, initializer=tensors)
    here, ends = results(label, CARRIED), results(f"{label}/ends", OUTPUTS)
    nodes = [
        make_node("LessOrEqual", ["layer", f"{label}/step"], [f"{label}/runs"]),
        if_node(f"{label}/runs", step, pass_through(parts, i, f"before_{i}", {"hidden": "hidden_in"}), here),
        if_node(f"{label}/stop", end_subgraph(parts, i, here), rest_of_the_run(parts, i), ends),
    ]
    return make_graph(nodes, label, [], ends, initializer=[scalar(f"{label}/step", INT64, i)])


def rest_of_the_run(parts: Parts, i: int) -> GraphProto:
    """Runs what follows after step i. Samples that have exited keep what they exited with."""
    label, deeper = f"after_{i}", steps_from(parts, i + 1)
    outputs = dict(zip(OUTPUTS, deeper.output, strict=True))
    nodes, tensors = [*deeper.node], [*deeper.initializer, exit_layer_tensor(parts, i, label)]
    for name, own in (("logits", f"level_{i}/logits"), ("exit_layer", f"{label}/number")):
        nodes.append(make_node("Where", [f"level_{i}/exited", own, outputs[name].name], [f"{label}/{name}"]))
        (outputs[name],) = results(label, [name])
    return make_graph(nodes, label, [], list(outputs.values()), initializer=tensors)


def end_subgraph(parts: Parts, i: int, here: Sequence[ValueInfoProto]) -> GraphProto:
    """Ends the run with the outputs of step i. here: these; an output's own name is what follows the last slash."""
    label, names = f"end_{i}", {x.name.split("/")[-1]: x.name for x in here} | {"exit_layer": f"end_{i}/number"}
    nodes = [make_node("Identity", [names[name]], [f"{label}/{name}"]) for name in OUTPUTS]
    return make_graph(nodes, label, [], results(label, OUTPUTS), initializer=[exit_layer_tensor(parts, i, label)])


def exit_layer_tensor(parts: Parts, i: int, label: str) -> TensorProto:
    return make_tensor(f"{label}/number", INT64, [1, 1], [parts.exit_layers[i]])


def step_and_exit(parts: Parts, i: int) -> GraphProto:
    """Runs step i and, where its cut-off is above 0, the exit after it; the last one always."""
    label, exit_ = f"layer_{i}", exit_subgraph(parts, i)
    names = {"inputs": "input_ids" if i == 0 else f"level_{i - 1}/hidden", "hidden": f"{label}/hidden"}
    nodes, tensors = with_prefix(parts.layers[i], label, names)
    hidden = value(f"{label}/hidden")
    if i == parts.last:
        outputs = [hidden, *exit_.output]
        return make_graph([*nodes, *exit_.node], label, [], outputs, initializer=[*tensors, *exit_.initializer])
    outputs = results(label, CARRIED[1:])
    nodes += [
        make_node("Gather", ["cutoffs", f"{label}/step"], [f"{label}/cutoff"]),
        make_node("Greater", [f"{label}/cutoff", f"{label}/zero"], [f"{label}/consulted"]),
        if_node(f"{label}/consulted", exit_, pass_through(parts, i, f"no_exit_{i}"), outputs),
    ]
    tensors += [scalar(f"{label}/step", INT64, i), scalar(f"{label}/zero", FLOAT, 0)]
    return make_graph(nodes, label, [], [hidden, *outputs], initializer=tensors)


def exit_subgraph(parts: Parts, i: int) -> GraphProto:
    """Runs exit i and, but for the last, decides which samples (b, 1) have exited by now, and whether the run ends."""
    label, cutoff = f"exit_{i}", f"layer_{i}/cutoff"
    names = {"logits": f"{label}/logits", "hidden": f"layer_{i}/hidden"}
    nodes, tensors = with_prefix(parts.exits[i], label, names)
    if i == parts.last:
        return make_graph(nodes, label, [], results(label, ["logits"]), initializer=tensors)
    exited = f"{label}/exits" if i == 0 else f"{label}/exited"
    nodes += [
        make_node("Unsqueeze", [f"{label}/uncertainty", f"{label}/one"], [f"{label}/column"]),
        make_node("Less", [f"{label}/column", cutoff], [f"{label}/below"]),
        make_node("Equal", [cutoff, f"{label}/infinity"], [f"{label}/all_exit"]),  # also those that are NaN
        make_node("Or", [f"{label}/below", f"{label}/all_exit"], [f"{label}/exits"]),
        *([] if i == 0 else [make_node("Or", [f"level_{i - 1}/exited", f"{label}/exits"], [exited])]),
        # all of them; with stop_at_first: not none of them
        make_node("Xor", [exited, "stop_at_first"], [f"{label}/as_wanted"]),
        make_node("ReduceMin", [f"{label}/as_wanted"], [f"{label}/all"], keepdims=0),
        make_node("Xor", [f"{label}/all", "stop_at_first"], [f"{label}/stop"]),
    ]
    tensors += [make_tensor(f"{label}/one", INT64, [1], [1]), scalar(f"{label}/infinity", FLOAT, math.inf)]
    outputs = [value(exited, BOOL) if x.name.endswith("/exited") else x for x in results(label, CARRIED[1:])]
    return make_graph(nodes, label, [], outputs, initializer=tensors)


def pass_through(parts: Parts, i: int, label: str, others: Mapping[str, str] | None = None) -> GraphProto:
    """The run continues without the outputs of exit i. others: what else to pass on."""
    before = "nobody" if i == 0 else f"level_{i - 1}/exited"
    passed = (others or {}) | {"logits": "no_logits", "exited": before, "stop": "no"}
    nodes = [make_node("Identity", [x], [f"{label}/{name}"]) for name, x in passed.items()]
    return make_graph(nodes, label, [], results(label, list(passed)))


def if_node(condition: str, then: GraphProto, other: GraphProto, outputs: Sequence[ValueInfoProto]) -> NodeProto:
    return make_node("If", [condition], [x.name for x in outputs], then_branch=then, else_branch=other)


def with_prefix(
    model: ModelProto, prefix: str, names: Mapping[str, str] | None = None
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and weights of a part. Names get a prefix, but for those in `names` and those that all parts share."""
    names = SHARED | {"": ""} | (names or {})  # "": an input that is left out

    def qualified(name: str) -> str:
        return names.get(name, f"{prefix}/{name}")

    for tensor in model.graph.initializer:
        tensor.name = qualified(tensor.name)
    for node in model.graph.node:
        node.name = qualified(node.name)
        node.input[:] = [qualified(name) for name in node.input]
        node.output[:] = [qualified(name) for name in node.output]
    return list(model.graph.node), list(model.graph.initializer)


def results(label: str, names: Sequence[str]) -> list[ValueInfoProto]:
    kinds = {"stop": BOOL, "exited": BOOL, "exit_layer": INT64}
    return [value(f"{label}/{name}", kinds.get(name, FLOAT)) for name in names]


def value(name: str, kind: int = FLOAT) -> ValueInfoProto:
    """A value without a shape, which differs from branch to branch."""
    return make_tensor_value_info(name, kind, None)


def scalar(name: str, kind: int, number: float) -> TensorProto:
    return make_tensor(name, kind, [], [number])
