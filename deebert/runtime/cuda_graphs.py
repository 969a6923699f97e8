"""Early exit on a GPU without waiting: layers as CUDA graphs, and each begins before the host knows who left before it.

At small batches a GPU is faster than Python can ask it for work. Here a layer with its off-ramp is one launch, and the
answer of off-ramp i is read while layer i+1 already runs; who has left by then costs the GPU a layer and nobody time.

Shapes: B batch, T tokens, H hidden, C labels; b <= B what is left of a batch. Graphs have fixed shapes: batches are
padded to a power of two, texts to one of LENGTHS.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deebert.modeling.checkpoints import max_tokens
from deebert.modeling.classifier import HighwayClassifierOutput, token_lengths
from deebert.modeling.early_exit import HighwayPass, config_rule
from deebert.modeling.exit_rules import ExitRule, entropy

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UP = 2  # passes before a capture: libraries choose their kernels in the first


class State:
    """What the graphs of one shape read and write: ids, types, mask (b, T), hidden (b, T, H), memory of the rule."""

    def __init__(self, shape: tuple[int, int], model):
        self.shape, device = shape, model.device
        # staged holds the inputs that come from the host, in memory that the GPU reads without its help
        self.staged = torch.zeros(3, *shape, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros(3, *shape, dtype=torch.long, device=device)
        self.ids, self.types, self.mask = self.inputs
        self.hidden = torch.zeros(*shape, model.config.hidden_size, dtype=model.dtype, device=device)
        self.memory: Tensor | None = None

    def fill(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> None:
        """Takes a batch's inputs. The rest is padding: other rows have a mask of one token, lest they answer NaN."""
        rows, width = len(ids), min(ids.shape[1], self.shape[1])
        inputs = self.inputs if ids.is_cuda else self.staged
        inputs.zero_()
        if rows < self.shape[0]:
            inputs[2, rows:, 0] = 1
        for place, tensor in enumerate((ids, types, mask)):
            if tensor is not None:
                inputs[place, :rows, :width] = tensor[:, :width]
        if inputs is self.staged:
            self.inputs.copy_(self.staged, non_blocking=True)

    def take(self, other: "State", places: Tensor) -> None:
        """Takes these rows (b,) of a larger state."""
        rows, width = len(places), self.shape[1]
        self.mask.zero_()
        self.mask[:, 0] = 1
        self.mask[:rows] = other.mask[places, :width]
        self.hidden[:rows] = other.hidden[places, :width]
        if other.memory is not None:
            self.remember(other.memory[places])

    def remember(self, memory: Tensor) -> None:
        """Stores the rule's memory of the first rows (b, ...)."""
        if self.memory is None:
            self.memory = memory.new_zeros(self.shape[0], *memory.shape[1:])
        self.memory[: len(memory)] = memory


class Exit:
    """What layer i of one shape answers, in memory that the host reads: logits (b, C), uncertainty (b,)."""

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

    def launch(self) -> "Exit":
        self.run()
        if self.event is not None:
            self.event.record()
        return self

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def leaves(self, places: np.ndarray, limit: float) -> np.ndarray:
        """(b,) bool of the rows at these places. An infinite limit takes everybody, NaN too."""
        return (self.uncertainty[places] < limit) | (limit == np.inf)


class GraphedDeeBert:
    """A model, called like itself in evaluation. Inputs may be on the CPU; answers are, and equal to the model's.

    Weights, temperatures and dtype (float32, bfloat16 or float16) are the model's and must not change any more; the
    threshold and the exit rule in `config` may. Graphs are captured when a shape is first met. On a CPU the same steps
    run without graphs. speculate: begin a layer before it is known who left behind the one before.
    """

    def __init__(self, model, speculate: bool = True):
        self.model, self.config, self.device, self.speculate = model.eval(), model.config, model.device, speculate
        self.longest = max_tokens(model.config)
        self.states: dict[tuple[int, int], State] = {}
        self.exits: dict[tuple, Exit] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        exit_threshold: float | Sequence[float] | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        rule, layers = config_rule(self.config), self.config.num_hidden_layers
        threshold = self.config.exit_threshold if exit_threshold is None else exit_threshold
        asked = HighwayPass(rule, rule.cutoffs(threshold, layers))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = token_lengths(attention_mask)
        lengths = np.full(len(input_ids), input_ids.shape[1]) if lengths is None else lengths.numpy()
        state = self.state(len(input_ids), int(lengths.max()))
        state.fill(input_ids, mask, token_type_ids)

        logits = np.empty((len(input_ids), self.config.num_labels), np.float32)
        exit_layer = np.zeros(len(input_ids), np.int64)
        rows = np.arange(len(input_ids))  # of the input, those that are still in
        places = rows  # theirs in the state
        here = self.exit(state, 0, asked).launch()
        here_places = places  # theirs in the state in which layer i ran
        for i in range(layers):
            last = i == layers - 1
            speculative = None
            if not last and self.speculate:
                speculative = self.exit(state, i + 1, asked).launch()
            if last or asked.asks(i):
                here.wait()
                leaves = np.ones(len(rows), bool) if last else here.leaves(here_places, asked.cutoffs[i])
                if leaves.any():
                    logits[rows[leaves]] = here.logits[here_places[leaves]]
                    exit_layer[rows[leaves]] = i + 1
                    rows, places, lengths = rows[~leaves], places[~leaves], lengths[~leaves]
            if len(rows) == 0:
                break
            here_places = places
            if speculative is None:
                state, places = self.compacted(state, places, lengths)
                here_places = places
                here = self.exit(state, i + 1, asked).launch()
            else:
                here = speculative
                if i + 2 < layers:
                    state, places = self.compacted(state, places, lengths)
        answer = torch.from_numpy(logits)
        return HighwayClassifierOutput(logits=answer, exit_layer=torch.from_numpy(exit_layer), entropy=entropy(answer))

    def compacted(self, state: State, places: np.ndarray, lengths: np.ndarray) -> tuple[State, np.ndarray]:
        """Those that stay, in a smaller shape where there is one, and their places in it."""
        smaller = self.state(len(places), int(lengths.max()))
        if smaller.shape == state.shape:
            return state, places
        smaller.take(state, torch.from_numpy(places).to(self.device))
        return smaller, np.arange(len(places))

    def state(self, rows: int, tokens: int) -> State:
        """The state for so many rows and tokens: the smallest shape that holds them."""
        tokens = min(next((length for length in LENGTHS if length >= tokens), tokens), max(self.longest, tokens))
        shape = (1 << (rows - 1).bit_length(), tokens)
        if shape not in self.states:
            self.states[shape] = State(shape, self.model)
        return self.states[shape]

    def exit(self, state: State, i: int, asked: HighwayPass) -> Exit:
        """Layer i for this shape, captured where it is new."""
        last = i == self.config.num_hidden_layers - 1
        consulted = not last and asked.asks(i)
        key = (state.shape, i, consulted, asked.rule)
        if key not in self.exits:
            found = self.exits[key] = Exit(state.shape[0], self.config.num_labels, self.device)
            found.run = self.captured(state, lambda: self.layer(state, i, consulted, asked.rule, found))
        return self.exits[key]

    def layer(self, state: State, i: int, consulted: bool, rule: ExitRule, found: Exit) -> None:
        """Runs layer i on the state, and the exit behind it where it is consulted."""
        inputs, last = state.ids if i == 0 else state.hidden, i == self.config.num_hidden_layers - 1
        types = state.types if i == 0 else None
        hidden, logits, certainty = self.model.step(i, inputs, state.mask, types, answer=consulted or last)
        if not last:
            state.hidden.copy_(hidden)
        uncertainty = None
        if consulted:
            uncertainty, memory = rule.uncertainty(logits, certainty, state.memory if i > 0 else None)
            if memory is not None:
                state.remember(memory)
        if consulted or last:
            found.write(logits, uncertainty)

    def captured(self, state: State, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a graph, which keeps the state as it is; on a CPU itself."""
        if self.pool is None:
            return run
        hidden, memory = state.hidden.clone(), None if state.memory is None else state.memory.clone()

        def restore() -> None:
            state.hidden.copy_(hidden)
            if memory is not None:
                state.memory.copy_(memory)

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
