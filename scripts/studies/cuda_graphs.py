"""Early exit as CUDA graphs, with speculation: on a GPU, the next layer begins before the previous exit is known.

A study, which benchmark.py times: what it gains on current GPUs is not known.

At small batches a GPU is faster than Python can launch work. Here each layer with its off-ramp is one CUDA graph, and
the next layer is launched before the host has read the off-ramp's result: if all samples exit there, one layer of GPU
work is wasted, but no latency is added. Graph i, from 0, ends at exit i (see onnx_export.py).

Shapes: B batch, T tokens, H hidden, C labels; b samples are still active. Graphs have fixed shapes: the number of rows
is padded to a power of two, texts to one of LENGTHS, or to a multiple of LONGER. A slot is a row of such a shape.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deebert.modeling.checkpoints import max_tokens
from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.config import config_cutoffs, has_several_labels
from deebert.modeling.early_exit import ActiveBatch, exits_now
from deebert.modeling.exit_rules import ExitRule, prediction_entropy
from deebert.runtime.onnx_export import additive_mask, exit_logits, run_step
from deebert.utils.arrays import token_lengths

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LONGER = 256  # the lengths of longer texts are multiples of it
WARM_UP = 2  # passes before a capture: libraries choose their kernels in the first


@dataclass
class SlottedBatch(ActiveBatch):
    """The active samples as the host knows them: index and lengths (b,) in numpy, and each one's slot on the GPU.

    Its tensors stay in a `State`.
    """

    slots: np.ndarray | None = None  # (b,)

    def keep(self, staying: np.ndarray) -> None:
        self.index, self.lengths, self.slots = self.index[staying], self.lengths[staying], self.slots[staying]


class State:
    """What the graphs of one shape read and write: ids, types, mask (b, T), hidden (b, T, H), the rule's state."""

    def __init__(self, shape: tuple[int, int], model):
        self.shape, device = shape, model.device
        # staged holds the inputs that come from the host, in pinned memory, which the GPU copies without waiting
        self.staged = torch.zeros(3, *shape, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros(3, *shape, dtype=torch.long, device=device)
        self.ids, self.types, self.mask = self.inputs
        self.hidden = torch.zeros(*shape, model.config.hidden_size, dtype=model.dtype, device=device)
        self.rule_state: Tensor | None = None

    def fill(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> None:
        """Copies a batch's inputs. Unused rows get a mask of one token, so that their logits are not NaN."""
        rows, width = len(ids), min(ids.shape[1], self.shape[1])
        inputs = self.inputs if ids.is_cuda else self.staged
        inputs.zero_()
        if rows < self.shape[0]:
            inputs[2, rows:, 0] = 1
        for part, tensor in enumerate((ids, types, mask)):
            if tensor is not None:
                inputs[part, :rows, :width] = tensor[:, :width]
        if inputs is self.staged:
            self.inputs.copy_(self.staged, non_blocking=True)

    def copy_rows(self, other: "State", slots: Tensor) -> None:
        """Copies these slots (b,) of a larger state into the first rows of this one."""
        rows, width = len(slots), self.shape[1]
        self.mask.zero_()
        self.mask[:, 0] = 1
        self.mask[:rows] = other.mask[slots, :width]
        self.hidden[:rows] = other.hidden[slots, :width]
        if other.rule_state is not None:
            self.set_rule_state(other.rule_state[slots])

    def set_rule_state(self, rule_state: Tensor) -> None:
        """Stores the rule's state of the first rows (b, ...)."""
        if self.rule_state is None:
            self.rule_state = rule_state.new_zeros(self.shape[0], *rule_state.shape[1:])
        self.rule_state[: len(rule_state)] = rule_state


class GraphedLayer:
    """Step i of one shape with the exit after it. Its outputs lie in memory that the host reads.

    logits: (b, C), uncertainty: (b,), both float32.
    """

    def __init__(self, rows: int, labels: int, device: torch.device):
        pinned = device.type == "cuda"
        self.logits_buffer = torch.zeros(rows, labels, pin_memory=pinned)
        self.uncertainty_buffer = torch.zeros(rows, pin_memory=pinned)
        self.logits, self.uncertainty = self.logits_buffer.numpy(), self.uncertainty_buffer.numpy()
        self.event = torch.cuda.Event() if pinned else None
        self.run: Callable[[], None]  # a graph's replay, or the layer itself

    def write(self, logits: Tensor, uncertainty: Tensor | None) -> None:
        """On the device, as a part of the graph. In float32: a copy that converts would wait for the host."""
        self.logits_buffer.copy_(logits.float(), non_blocking=True)
        if uncertainty is not None:
            self.uncertainty_buffer.copy_(uncertainty.float(), non_blocking=True)

    def launch(self) -> "GraphedLayer":
        self.run()
        if self.event is not None:
            self.event.record()
        return self

    def wait(self) -> None:
        """Until the outputs are there."""
        if self.event is not None:
            self.event.synchronize()


class GraphedDeeBert:
    """Runs a model by CUDA graphs; called like the model in evaluation.

    Inputs may be on the CPU or the GPU. Outputs are on the CPU, and equal the model's.

    Weights and dtype (float32, bfloat16 or float16) are the model's and must not change any more; the
    threshold and the exit rule in `config` may. Graphs are captured when a shape first occurs. On a CPU the same steps
    run without graphs. speculate: launch a layer before the result of the previous exit is known.
    Calls from several threads wait for one another, since the graphs' buffers are shared.
    """

    def __init__(self, model, speculate: bool = True):
        self.model, self.config, self.device, self.speculate = model.eval(), model.config, model.device, speculate
        self.exit_layers, self.last = model.config.exit_layers, len(model.config.exit_layers) - 1
        self.longest = max_tokens(model.config)
        self.states: dict[tuple[int, int], State] = {}
        self.layers: dict[tuple, GraphedLayer] = {}
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        exit_threshold: float | Sequence[float] | None = None,
        early_exit_entropy: float | Sequence[float] | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        threshold = early_exit_entropy if exit_threshold is None else exit_threshold
        rule, cutoffs = config_cutoffs(self.config, threshold)
        size, mask = len(input_ids), attention_mask
        if size == 0 or (mask is not None and mask.dim() != 2):
            raise ValueError("give input_ids (B, T) of at least one text, and attention_mask (B, T)")
        if mask is None or (size == 1 and mask.is_cuda):  # the lengths on a GPU are not worth waiting for
            lengths = np.full(size, input_ids.shape[1])
        else:
            lengths = token_lengths(mask)
        mask = torch.ones_like(input_ids) if mask is None else mask
        batch = SlottedBatch(np.arange(size), lengths, slots=np.arange(size))
        logits = torch.from_numpy(np.empty((size, self.config.num_labels), np.float32))
        exit_layer = torch.zeros(size, dtype=torch.long)
        with self.lock:
            state = self.state(size, batch.longest)
            state.fill(input_ids, mask, token_type_ids)
            self.run_layers(batch, state, rule, cutoffs, logits.numpy(), exit_layer.numpy())
        nats = prediction_entropy(logits, has_several_labels(self.config))
        return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=nats)

    def run_layers(
        self,
        batch: SlottedBatch,
        state: State,
        rule: ExitRule,
        cutoffs: Sequence[float],
        logits: np.ndarray,
        exit_layer: np.ndarray,
    ) -> None:
        """The loop of early_exit.py with speculation. Writes logits (B, C) and exit layers (B,) in input order."""
        current = self.layer(state, 0, rule, cutoffs).launch()
        current_slots = batch.slots  # in the state in which `current` runs; batch.slots are those of `state`
        for i, exit_here in enumerate(self.exit_layers):
            last = i == self.last
            upcoming = None
            if self.speculate and not last:
                upcoming = self.layer(state, i + 1, rule, cutoffs).launch()
            if last or rule.consults(cutoffs, i):
                current.wait()
                exiting = exits_now(current.uncertainty[current_slots], np.inf if last else cutoffs[i])
                logits[batch.index[exiting]] = current.logits[current_slots[exiting]]
                exit_layer[batch.index[exiting]] = exit_here
                batch.keep(~exiting)
            if len(batch) == 0:
                break
            if upcoming is None:
                state = self.compacted(state, batch)
                upcoming, current_slots = self.layer(state, i + 1, rule, cutoffs).launch(), batch.slots
            else:
                current_slots = batch.slots
                if i + 1 < self.last:
                    state = self.compacted(state, batch)
            current = upcoming

    def compacted(self, state: State, batch: SlottedBatch) -> State:
        """The active samples in a smaller shape, where there is one; sets their slots in it."""
        smaller = self.state(len(batch), batch.longest)
        if smaller.shape == state.shape:
            return state
        smaller.copy_rows(state, torch.from_numpy(batch.slots).to(self.device))
        batch.slots = np.arange(len(batch))
        return smaller

    def state(self, rows: int, tokens: int) -> State:
        """The state for this many rows and tokens: the smallest shape that holds them."""
        length = next((length for length in LENGTHS if length >= tokens), -(-tokens // LONGER) * LONGER)
        tokens = min(length, max(self.longest, tokens))
        shape = (1 << (rows - 1).bit_length(), tokens)
        if shape not in self.states:
            self.states[shape] = State(shape, self.model)
        return self.states[shape]

    def layer(self, state: State, i: int, rule: ExitRule, cutoffs: Sequence[float]) -> GraphedLayer:
        """Step i for this shape, captured where it is new."""
        consult = rule.consults(cutoffs, i)
        key = (state.shape, i, consult, rule)
        if key not in self.layers:
            layer = GraphedLayer(state.shape[0], self.config.num_labels, self.device)
            layer.run = self.captured(state, lambda: self.run_layer(state, i, consult, rule, layer))
            self.layers[key] = layer  # only now: a capture may fail
        return self.layers[key]

    def run_layer(self, state: State, i: int, consult: bool, rule: ExitRule, layer: GraphedLayer) -> None:
        """Runs step i on the state, and the exit after it where it is consulted."""
        last = i == self.last
        inputs, types = (state.ids, state.types) if i == 0 else (state.hidden, None)
        hidden = run_step(self.model, i, inputs, additive_mask(self.model, state.mask), types)
        if not last:
            state.hidden.copy_(hidden)
        if not (consult or last):
            return
        logits = exit_logits(self.model, i, hidden, self.model.pooling_weights(state.mask))
        uncertainty = None
        if consult:
            uncertainty, rule_state = rule.uncertainty(logits, state.rule_state if i > 0 else None)
            if rule_state is not None:
                state.set_rule_state(rule_state)
        layer.write(logits, uncertainty)

    def captured(self, state: State, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a graph, which keeps the state as it is; on a CPU itself."""
        if self.pool is None:
            return run
        hidden, rule_state = state.hidden.clone(), None if state.rule_state is None else state.rule_state.clone()

        def restore() -> None:
            state.hidden.copy_(hidden)
            if rule_state is not None:
                state.rule_state.copy_(rule_state)

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        restore()
        return graph.replay
