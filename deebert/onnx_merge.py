"""Several ONNX graphs, of layers, as one: each run of it is the run of one of them, picked by an input.

One session then serves all layers, and its threads are awake from one layer to the next; sessions of their own wake
theirs at every layer, which was a quarter of the time of a small model.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, TensorProto, ValueInfoProto, helper

LAYER, IDS, HIDDEN = "layer", "input_ids", "hidden_in"  # inputs; attention_mask and token_type_ids beside them
SHARED = {"attention_mask": "attention_mask", "token_type_ids": "token_type_ids"}
OUTPUTS = ("hidden", "logits", "certainty")


def merge_layers(layers: Sequence[Path], path: Path) -> None:
    """Writes one graph of the graphs of all layers, as export.export_layer makes them.

    Inputs: the layer (), from 0, input_ids and token_type_ids (b, T) of the first layer, hidden_in (b, T, H) of others
    (what a layer does not read may be empty), attention_mask (b, T). Outputs: hidden (b, T, H), logits (b, C) and,
    where the layers have it, certainty (b,); hidden and certainty mean nothing behind the last layer.
    """
    models = [onnx.load(layer) for layer in layers]
    outputs = OUTPUTS[: len(models[0].graph.output)]
    first, second = ({value.name: value for value in model.graph.input} for model in models[:2])
    branches = [branch(model.graph, i, outputs) for i, model in enumerate(models[:-1])]
    graph = branch(models[-1].graph, len(models) - 1, outputs)
    kinds = {output.name: output for output in models[0].graph.output}
    for i, taken in reversed(list(enumerate(branches))):
        graph = either(i, taken, graph, [renamed(kinds[name], f"{name}_from_{i}") for name in outputs])
    for output, name in zip(graph.output, outputs, strict=True):
        graph.node.add().CopyFrom(helper.make_node("Identity", [output.name], [name]))
    final = [renamed(kinds[name], name) for name in outputs]
    del graph.output[:]
    graph.output.extend(final)
    graph.input.extend(
        [
            helper.make_tensor_value_info(LAYER, TensorProto.INT64, []),
            free(first["inputs"], IDS),
            free(first["token_type_ids"], "token_type_ids"),
            free(second["inputs"], HIDDEN),
            free(first["attention_mask"], "attention_mask"),
        ]
    )
    opsets = {(opset.domain, opset.version) for model in models for opset in model.opset_import}
    merged = helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in sorted(opsets)])
    merged.ir_version = max(model.ir_version for model in models)
    onnx.save(merged, path)


def branch(graph: GraphProto, i: int, outputs: Sequence[str]) -> GraphProto:
    """Layer i as a branch of an If: no inputs of its own, names that no other branch has, all of the outputs."""
    names = SHARED | {"inputs": IDS if i == 0 else HIDDEN, "": ""}

    def own(name: str) -> str:
        return names.get(name, f"layer{i}/{name}")

    for tensor in graph.initializer:
        tensor.name = own(tensor.name)
    for node in graph.node:
        node.name = own(node.name)
        node.input[:] = [own(name) for name in node.input]
        node.output[:] = [own(name) for name in node.output]
    given = {output.name: renamed(output, own(output.name)) for output in graph.output}
    nodes, tensors = list(graph.node), list(graph.initializer)
    results = []
    for name in outputs:
        if name in given:
            results.append(given[name])
            continue
        # the last layer: whatever has the right type
        stand_in = HIDDEN if name == "hidden" else own("no_certainty")
        if name == "certainty":
            tensors.append(helper.make_tensor(stand_in, TensorProto.FLOAT, [1], [0.0]))
        nodes.append(helper.make_node("Identity", [stand_in], [own(name)]))
        results.append(helper.make_tensor_value_info(own(name), TensorProto.FLOAT, None))
    return helper.make_graph(nodes, f"layer{i}", [], results, initializer=tensors)


def either(i: int, taken: GraphProto, other: GraphProto, results: list[ValueInfoProto]) -> GraphProto:
    """The graph that runs `taken` where the input says layer i, else `other`."""
    number, is_it = f"number_{i}", f"is_{i}"
    nodes = [
        helper.make_node("Equal", [LAYER, number], [is_it]),
        helper.make_node("If", [is_it], [value.name for value in results], then_branch=taken, else_branch=other),
    ]
    return helper.make_graph(
        nodes, f"from{i}", [], results, initializer=[helper.make_tensor(number, TensorProto.INT64, [], [i])]
    )


def renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    """The same type without a shape, which differs from branch to branch."""
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None)


def free(value: ValueInfoProto, name: str) -> ValueInfoProto:
    """The same type and rank, with sizes of its own where they are not fixed: unread inputs may be empty."""
    dims = value.type.tensor_type.shape.dim
    shape = [dim.dim_value if dim.HasField("dim_value") else f"{name}_{k}" for k, dim in enumerate(dims)]
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, shape)
