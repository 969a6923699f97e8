"""One ONNX graph of a model's parts, which runs layer after layer until a sample may exit.

Each layer lies in an If inside the previous layer's branch; the run ends where an uncertainty is below its cut-off, so
that a single text costs one run. A run may begin at any layer: there the samples of a batch that are still active
resume. One session serves all layers, and its threads stay awake from one to the next; a session for each layer wakes
them again each time, which costs a quarter of a small model's time. A Loop over layers is 6 % slower than nested Ifs.

Step i, from 0, ends at exit i (see layer_runner.py). This is the one place that repeats the decision of
modeling/early_exit.py; the parity tests hold the two together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from deebert.modeling.config import config_rule

MOST_EXITS = 32  # readers of protobuf, and so of ONNX, take messages within messages a hundred deep
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
SHARED = {name: name for name in ("attention_mask", "token_type_ids", "mask", "pooling_weights")}


@dataclass(frozen=True)
class Parts:
    """The graphs of a model's parts; E exits, b samples, T tokens, H hidden, C labels.

    masks: attention_mask (b, T) -> mask (b, 1, 1, T) and, where off-ramps need it, pooling_weights (b, T).
    layers: (E,) of each step: inputs, token ids (b, T) of the first, hidden states (b, T, H) of others, mask, and
        token_type_ids (b, T) of the first -> hidden (b, T, H), of the last (b, 1, H).
    exits: (E,) hidden and, where they need it, pooling_weights -> logits (b, C), uncertainty (b,) by the model's exit
        rule (a stateful one as if there were no state) and, where there is a learning-to-exit head, certainty (b,).
    exit_layers: (E,) the layer of each exit.
    """

    masks: ModelProto
    layers: Sequence[ModelProto]
    exits: Sequence[ModelProto]
    exit_layers: Sequence[int]

    @classmethod
    def load(cls, folder: Path, exit_layers: Sequence[int]) -> "Parts":
        """As onnx_export.export_parts writes them."""
        return cls(
            onnx.load(folder / "masks.onnx"),
            [onnx.load(folder / f"layer_{i}.onnx") for i in range(len(exit_layers))],
            [onnx.load(folder / f"exit_{i}.onnx") for i in range(len(exit_layers))],
            exit_layers,
        )

    def __iter__(self) -> Iterator[ModelProto]:
        return iter([self.masks, *self.layers, *self.exits])

    @property
    def last(self) -> int:
        """The last step, from 0."""
        return len(self.layers) - 1

    @property
    def exit_outputs(self) -> list[str]:
        """The names of an exit's outputs."""
        return [output.name for output in self.exits[0].graph.output]


def merge(folder: Path, config, path: Path) -> None:
    """Writes one graph of all parts in a folder, of a model of that config, which has at most MOST_EXITS exits.

    Inputs: input_ids, token_type_ids and attention_mask, (b, T) int64. They suffice to run the model at its stored
    threshold; for patience they do not, as it needs state. Optional inputs:
        layer () int64: the step, from 0, with which to begin; 0 if not given.
        hidden_in (b, T, H): the previous step's hidden states where layer > 0; the ids may be empty then.
        limits (E-1,): the cut-offs. The run ends after a layer where an uncertainty is below its cut-off. An off-ramp
            whose cut-off is 0 or less does not run.
    Outputs, all of the layer where the run ended:
        exit_layer () int64, from 1; 0: before the first layer.
        hidden (b, T, H), after the last layer (b, 1, H).
        logits (b, C), uncertainty (b,) and, where the model has a learning-to-exit head, certainty (b,).
    """
    parts = Parts.load(folder, config.exit_layers)
    nodes, tensors = with_prefix(parts.masks, "masks")
    tensors += [scalar("yes", BOOL, True), scalar("zero", FLOAT, 0)]
    for name in parts.exit_outputs:
        tensors.append(make_tensor(f"no_{name}", FLOAT, [0, config.num_labels] if name == "logits" else [0], []))
    run = layers_from(parts, 0)
    nodes += run.node
    tensors += run.initializer
    names = ["exit_layer", "hidden", *parts.exit_outputs]
    nodes += [make_node("Identity", [x.name], [name]) for x, name in zip(run.output, names, strict=True)]
    inputs = []
    for name in (
        "input_ids",
        "token_type_ids",
        "attention_mask",
    ):  # sizes of their own: inputs that are not read may be empty
        inputs.append(make_tensor_value_info(name, INT64, [f"{name}_b", f"{name}_t"]))
    cutoffs = config_rule(config).cutoffs(config.exit_threshold, len(config.exit_layers))
    for name, kind, shape, default in (
        ("layer", INT64, [], [0]),
        ("hidden_in", FLOAT, ["hidden_in_b", "hidden_in_t", config.hidden_size], []),
        ("limits", FLOAT, [len(cutoffs)], cutoffs),
    ):
        inputs.append(make_tensor_value_info(name, kind, shape))
        tensors.append(make_tensor(name, kind, [size if isinstance(size, int) else 0 for size in shape], default))
    shapes = {"hidden": ["b", "t", config.hidden_size], "logits": ["b", config.num_labels]}
    outputs = [make_tensor_value_info("exit_layer", INT64, [])]
    outputs += [make_tensor_value_info(name, FLOAT, shapes.get(name, ["b"])) for name in names[1:]]
    opsets = sorted({(opset.domain, opset.version) for part in parts for opset in part.opset_import})
    model = make_model(
        make_graph(nodes, "deebert", inputs, outputs, initializer=tensors),
        opset_imports=[make_opsetid(*opset) for opset in opsets],
        ir_version=max(part.ir_version for part in parts),
    )
    onnx.save(model, path)


def layers_from(parts: Parts, i: int) -> GraphProto:
    """Runs step i, unless the run begins after it, and the following ones, until the run ends."""
    label, layer = f"level_{i}", layer_and_exit(parts, i)
    if i == parts.last:
        end = stop_subgraph(parts, i, layer.output)
        tensors = [*layer.initializer, *end.initializer]
        return make_graph([*layer.node, *end.node], label, [], end.output, initializer=tensors)
    go, *outputs_here = results(label, ["go", "hidden", *parts.exit_outputs])
    ends = results(f"{label}/ends", ["exit_layer", "hidden", *parts.exit_outputs])
    nodes = [
        make_node("LessOrEqual", ["layer", f"{label}/number"], [f"{label}/here"]),
        if_node(
            f"{label}/here", layer, pass_through(parts, f"before_{i}", {"hidden": "hidden_in"}), [go, *outputs_here]
        ),
        if_node(go.name, layers_from(parts, i + 1), stop_subgraph(parts, i, outputs_here), ends),
    ]
    return make_graph(nodes, label, [], ends, initializer=[scalar(f"{label}/number", INT64, i)])


def stop_subgraph(parts: Parts, i: int, outputs_here: Sequence[ValueInfoProto]) -> GraphProto:
    """The run ends with the outputs of step i: hidden states and those of the exit."""
    outputs = results(f"end_{i}", ["exit_layer", "hidden", *parts.exit_outputs])
    reads = [f"end_{i}/number", *(x.name for x in outputs_here)]
    nodes = [make_node("Identity", [x], [y.name]) for x, y in zip(reads, outputs, strict=True)]
    return make_graph(
        nodes, f"end_{i}", [], outputs, initializer=[scalar(f"end_{i}/number", INT64, parts.exit_layers[i])]
    )


def layer_and_exit(parts: Parts, i: int) -> GraphProto:
    """Runs step i and, where its cut-off is above 0, the exit after it; the last one always."""
    label, exit_ = f"layer_{i}", exit_subgraph(parts, i)
    nodes, tensors = with_prefix(
        parts.layers[i],
        label,
        {"inputs": "input_ids" if i == 0 else f"level_{i - 1}/hidden", "hidden": f"{label}/hidden"},
    )
    if i == parts.last:
        outputs = [value(f"{label}/hidden"), *exit_.output]
        return make_graph([*nodes, *exit_.node], label, [], outputs, initializer=[*tensors, *exit_.initializer])
    go, hidden, *exit_outputs = results(label, ["go", "hidden", *parts.exit_outputs])
    nodes += [
        make_node("Gather", ["limits", f"{label}/number"], [f"{label}/cutoff"]),
        make_node("Greater", [f"{label}/cutoff", "zero"], [f"{label}/consulted"]),
        if_node(f"{label}/consulted", exit_, pass_through(parts, f"no_exit_{i}"), [go, *exit_outputs]),
    ]
    tensors.append(scalar(f"{label}/number", INT64, i))
    return make_graph(nodes, label, [], [go, hidden, *exit_outputs], initializer=tensors)


def exit_subgraph(parts: Parts, i: int) -> GraphProto:
    """Runs exit i; but for the last, output `go` says whether the run continues."""
    label = f"exit_{i}"
    names = {name: f"{label}/{name}" for name in parts.exit_outputs}
    nodes, tensors = with_prefix(parts.exits[i], label, names | {"hidden": f"layer_{i}/hidden"})
    if i == parts.last:
        return make_graph(nodes, label, [], results(label, parts.exit_outputs), initializer=tensors)
    nodes += [  # an uncertainty that is NaN ends the run, too: it compares false, and no minimum is taken of it
        make_node("GreaterOrEqual", [f"{label}/uncertainty", f"layer_{i}/cutoff"], [f"{label}/stay"]),
        make_node("Cast", [f"{label}/stay"], [f"{label}/numbers"], to=INT64),
        make_node("ReduceMin", [f"{label}/numbers"], [f"{label}/lowest"], keepdims=0),
        make_node("Cast", [f"{label}/lowest"], [f"{label}/go"], to=BOOL),
    ]
    return make_graph(nodes, label, [], results(label, ["go", *parts.exit_outputs]), initializer=tensors)


def pass_through(parts: Parts, label: str, others: Mapping[str, str] | None = None) -> GraphProto:
    """The run continues without the outputs of an exit. others: what else to pass on."""
    passed = {"go": "yes"} | (others or {}) | {name: f"no_{name}" for name in parts.exit_outputs}
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
    kinds = {"go": BOOL, "exit_layer": INT64}
    return [value(f"{label}/{name}", kinds.get(name, FLOAT)) for name in names]


def value(name: str, kind: int = FLOAT) -> ValueInfoProto:
    """A value without a shape, which differs from branch to branch."""
    return make_tensor_value_info(name, kind, None)


def scalar(name: str, kind: int, number: float) -> TensorProto:
    return make_tensor(name, kind, [], [number])
