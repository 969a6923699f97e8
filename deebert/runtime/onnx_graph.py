"""The ONNX graphs of a model's parts as one, which runs layer after layer until a sample may leave.

Each layer lies in an If behind the layer before it, which ends the run where an uncertainty is below its limit, so that
a single text costs one run of the graph. It may begin at any layer: there, what is left of a batch goes on. One session
serves all layers, and its threads are awake from one to the next; a session for each layer wakes them anew, a quarter
of a small model's time. A Loop over layers, one of which Ifs pick, is 6 % slower than Ifs within Ifs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from deebert.modeling.early_exit import config_rule

MOST_LAYERS = 32  # readers of protobuf, and so of ONNX, take messages within messages a hundred deep
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
SHARED = {name: name for name in ("attention_mask", "token_type_ids", "mask", "token_weights")}


@dataclass(frozen=True)
class Parts:
    """The graphs of a model's parts; N layers, b samples, T tokens, H hidden, C labels.

    masks: attention_mask (b, T) -> mask (b, 1, 1, T) and, where off-ramps read it, token_weights (b, T).
    layers: (N,) inputs, token ids (b, T) of the first, hidden states (b, T, H) of others, mask, and token_type_ids
        (b, T) of the first -> hidden (b, T, H), of the last (b, 1, H).
    exits: (N,) hidden and, where they read it, token_weights -> logits (b, C), uncertainty (b,) by the model's exit
        rule and, where there is a learning-to-exit head, its certainty (b,). A rule that stateful measures anew.
    """

    masks: ModelProto
    layers: Sequence[ModelProto]
    exits: Sequence[ModelProto]

    @classmethod
    def load(cls, folder: Path, layers: int) -> "Parts":
        """As export.export_parts writes them."""
        return cls(
            onnx.load(folder / "masks.onnx"),
            [onnx.load(folder / f"layer_{i}.onnx") for i in range(layers)],
            [onnx.load(folder / f"exit_{i}.onnx") for i in range(layers)],
        )

    def __iter__(self) -> Iterator[ModelProto]:
        return iter([self.masks, *self.layers, *self.exits])

    @property
    def last(self) -> int:
        """The last layer, from 0."""
        return len(self.layers) - 1

    @property
    def answers(self) -> list[str]:
        """What an exit tells the caller."""
        return [output.name for output in self.exits[0].graph.output]


def merge(folder: Path, config, path: Path) -> None:
    """Writes one graph of all parts in a folder, of a model of that config.

    Inputs: input_ids and token_type_ids (b, T), which the first layer reads, attention_mask (b, T). They will do for
    the whole model at its own threshold, unless its rule stateful. Otherwise: layer (), from 0, where to begin;
    hidden_in (b, T, H), which all layers but the first read (the ids may be empty then); limits (N-1,), below which the
    run ends behind a layer; an off-ramp whose limit is not above 0 is not run.
    Outputs: exit_layer (), from 1, where the run ended; hidden (b, T, H), of the last layer (b, 1, H), logits (b, C),
    uncertainty (b,) and, where there is such a head, certainty (b,) there.
    Takes up to MOST_LAYERS layers.
    """
    parts = Parts.load(folder, config.num_hidden_layers)
    nodes, tensors = placed(parts.masks, "masks")
    tensors += [scalar("yes", BOOL, True), scalar("zero", FLOAT, 0)]
    for name in parts.answers:
        tensors.append(make_tensor(f"no_{name}", FLOAT, [0, config.num_labels] if name == "logits" else [0], []))
    run = level(parts, 0)
    nodes += run.node
    tensors += run.initializer
    found = ["exit_layer", "hidden", *parts.answers]
    nodes += [make_node("Identity", [x.name], [name]) for x, name in zip(run.output, found, strict=True)]
    inputs = []
    for name in ("input_ids", "token_type_ids", "attention_mask"):  # sizes of their own: what is not read may be empty
        inputs.append(make_tensor_value_info(name, INT64, [f"{name}_b", f"{name}_t"]))
    cutoffs = config_rule(config).cutoffs(config.exit_threshold, config.num_hidden_layers)
    for name, kind, shape, default in (
        ("layer", INT64, [], [0]),
        ("hidden_in", FLOAT, ["hidden_in_b", "hidden_in_t", config.hidden_size], []),
        ("limits", FLOAT, [len(cutoffs)], cutoffs),
    ):
        inputs.append(make_tensor_value_info(name, kind, shape))
        tensors.append(make_tensor(name, kind, [size if isinstance(size, int) else 0 for size in shape], default))
    shapes = {"hidden": ["b", "t", config.hidden_size], "logits": ["b", config.num_labels]}
    outputs = [make_tensor_value_info("exit_layer", INT64, [])]
    outputs += [make_tensor_value_info(name, FLOAT, shapes.get(name, ["b"])) for name in found[1:]]
    opsets = sorted({(opset.domain, opset.version) for part in parts for opset in part.opset_import})
    model = make_model(
        make_graph(nodes, "deebert", inputs, outputs, initializer=tensors),
        opset_imports=[make_opsetid(*opset) for opset in opsets],
        ir_version=max(part.ir_version for part in parts),
    )
    onnx.save(model, path)


def level(parts: Parts, i: int) -> GraphProto:
    """Runs layer i, unless the run begins behind it, and those behind it, until the run ends."""
    label, layer = f"level_{i}", layer_and_exit(parts, i)
    if i == parts.last:
        end = ended(parts, i, layer.output)
        tensors = [*layer.initializer, *end.initializer]
        return make_graph([*layer.node, *end.node], label, [], end.output, initializer=tensors)
    go, *behind = results(label, ["go", "hidden", *parts.answers])
    found = results(f"{label}/found", ["exit_layer", "hidden", *parts.answers])
    nodes = [
        make_node("LessOrEqual", ["layer", f"{label}/number"], [f"{label}/here"]),
        branch(f"{label}/here", layer, no_answer(parts, f"before_{i}", {"hidden": "hidden_in"}), [go, *behind]),
        branch(go.name, level(parts, i + 1), ended(parts, i, behind), found),
    ]
    return make_graph(nodes, label, [], found, initializer=[scalar(f"{label}/number", INT64, i)])


def ended(parts: Parts, i: int, behind: Sequence[ValueInfoProto]) -> GraphProto:
    """The run ends with what is behind layer i: hidden states and answers."""
    found = results(f"end_{i}", ["exit_layer", "hidden", *parts.answers])
    reads = [f"end_{i}/number", *(x.name for x in behind)]
    nodes = [make_node("Identity", [x], [y.name]) for x, y in zip(reads, found, strict=True)]
    return make_graph(nodes, f"end_{i}", [], found, initializer=[scalar(f"end_{i}/number", INT64, i + 1)])


def layer_and_exit(parts: Parts, i: int) -> GraphProto:
    """Runs layer i and, where its limit is above 0, the exit behind it; the last layer's always."""
    label, exit_ = f"layer_{i}", ask(parts, i)
    nodes, tensors = placed(
        parts.layers[i],
        label,
        {"inputs": "input_ids" if i == 0 else f"level_{i - 1}/hidden", "hidden": f"{label}/hidden"},
    )
    if i == parts.last:
        found = [value(f"{label}/hidden"), *exit_.output]
        return make_graph([*nodes, *exit_.node], label, [], found, initializer=[*tensors, *exit_.initializer])
    go, hidden, *answers = results(label, ["go", "hidden", *parts.answers])
    nodes += [
        make_node("Gather", ["limits", f"{label}/number"], [f"{label}/limit"]),
        make_node("Greater", [f"{label}/limit", "zero"], [f"{label}/asked"]),
        branch(f"{label}/asked", exit_, no_answer(parts, f"no_exit_{i}"), [go, *answers]),
    ]
    tensors.append(scalar(f"{label}/number", INT64, i))
    return make_graph(nodes, label, [], [go, hidden, *answers], initializer=tensors)


def ask(parts: Parts, i: int) -> GraphProto:
    """Runs the exit behind layer i and, but for the last, says whether to go on."""
    label = f"exit_{i}"
    names = {name: f"{label}/{name}" for name in parts.answers}
    nodes, tensors = placed(parts.exits[i], label, names | {"hidden": f"layer_{i}/hidden"})
    if i == parts.last:
        return make_graph(nodes, label, [], results(label, parts.answers), initializer=tensors)
    nodes += [  # an uncertainty that is NaN ends the run, too: it compares false, and no minimum is taken of it
        make_node("GreaterOrEqual", [f"{label}/uncertainty", f"layer_{i}/limit"], [f"{label}/stay"]),
        make_node("Cast", [f"{label}/stay"], [f"{label}/numbers"], to=INT64),
        make_node("ReduceMin", [f"{label}/numbers"], [f"{label}/lowest"], keepdims=0),
        make_node("Cast", [f"{label}/lowest"], [f"{label}/go"], to=BOOL),
    ]
    return make_graph(nodes, label, [], results(label, ["go", *parts.answers]), initializer=tensors)


def no_answer(parts: Parts, label: str, others: Mapping[str, str] | None = None) -> GraphProto:
    """Goes on without an answer. others: what else there is to hand on."""
    found = {"go": "yes"} | (others or {}) | {name: f"no_{name}" for name in parts.answers}
    nodes = [make_node("Identity", [x], [f"{label}/{name}"]) for name, x in found.items()]
    return make_graph(nodes, label, [], results(label, list(found)))


def branch(condition: str, then: GraphProto, other: GraphProto, found: Sequence[ValueInfoProto]) -> NodeProto:
    return make_node("If", [condition], [x.name for x in found], then_branch=then, else_branch=other)


def placed(
    model: ModelProto, prefix: str, names: Mapping[str, str] | None = None
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and weights of a part, under `names`, the names that all parts share, and a prefix for all others."""
    names = SHARED | {"": ""} | (names or {})  # "": an input that is left out

    def own(name: str) -> str:
        return names.get(name, f"{prefix}/{name}")

    for tensor in model.graph.initializer:
        tensor.name = own(tensor.name)
    for node in model.graph.node:
        node.name = own(node.name)
        node.input[:] = [own(name) for name in node.input]
        node.output[:] = [own(name) for name in node.output]
    return list(model.graph.node), list(model.graph.initializer)


def results(label: str, names: Sequence[str]) -> list[ValueInfoProto]:
    kinds = {"go": BOOL, "exit_layer": INT64}
    return [value(f"{label}/{name}", kinds.get(name, FLOAT)) for name in names]


def value(name: str, kind: int = FLOAT) -> ValueInfoProto:
    """Without a shape: it differs from branch to branch."""
    return make_tensor_value_info(name, kind, None)


def scalar(name: str, kind: int, number: float) -> TensorProto:
    return make_tensor(name, kind, [], [number])
