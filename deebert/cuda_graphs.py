"""Early exit on a GPU without waiting: layers as CUDA graphs, and each begins before the host knows who left before it.

At small batches a GPU is faster than Python can ask it for work. Here a layer with its off-ramp is one launch, and the
answer of off-ramp i is read while layer i+1 already runs; who has left by then costs the GPU a layer and nobody time.

Shapes: B batch, T tokens, H hidden, C labels; b <= B what is left of a batch. Graphs have fixed shapes: batches are
padded to a power of two, texts to one of LENGTHS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deebert.checkpoints import max_tokens
from deebert.exit_rules import ExitRule, entropy
from deebert.highway import HighwayPass, config_rule
from deebert.modeling_highway import HighwayClassifierOutput, token_lengths

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UP = 2  # passes before a capture: libraries choose their kernels in the first


@dataclass
class State:
    """What the graphs of one shape read and write: ids, types, mask (b, T), hidden (b, T, H), memory of the rule."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    hidden: Tensor
    memory: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.ids.shape)

    def fill(self, rows: int, mask: Tensor, ids: Tensor | None = None, types: Tensor | None = None) -> None:
        """Takes so many rows, and what they bring; the rest is padding that is told apart by a mask of one token."""
        self.mask.zero_()
        self.mask[:, 0] = 1
        self.mask[:rows, : mask.shape[1]] = mask
        if ids is not None:
            self.ids[:rows, : ids.shape[1]] = ids
            self.types.zero_()
            if types is not None:
                self.types[:rows, : types.shape[1]] = types


class Exit:
    """What layer i of one shape answers, in memory that the host reads: logits (b, C), uncertainty (b,)."""

    def __init__(self, rows: int, labels: int, device: torch.device):
        pinned = device.type == "cuda"
        self.logits = torch.zeros(rows, labels, pin_memory=pinned)
        self.uncertainty = torch.zeros(rows, pin_memory=pinned)
        self.event = torch.cuda.Event() if pinned else None
        self.run: Callable[[], None]  # a graph's replay, or the layer itself

    def launch(self) -> "Exit":
        self.run()
        if self.event is not None:
            self.event.record()
        return self

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class GraphedDeeBert:
    """A model, called like itself in evaluation; answers are on the CPU, equal to the model's to float tolerance.

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
        early_exit_entropy: float | Sequence[float] | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        rule, layers = config_rule(self.config), self.config.num_hidden_layers
        threshold = self.config.early_exit_entropy if early_exit_entropy is None else early_exit_entropy
        asked = HighwayPass(rule, rule.limits(threshold, layers))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = token_lengths(attention_mask)
        lengths = np.full(len(input_ids), input_ids.shape[1]) if lengths is None else lengths.numpy()
        state = self.state(len(input_ids), int(lengths.max()))
        width = min(input_ids.shape[1], state.shape[1])
        types = None if token_type_ids is None else token_type_ids[:, :width]
        state.fill(len(input_ids), mask[:, :width], input_ids[:, :width], types)

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
                leaves = np.ones(len(rows), bool) if last else self.leaves(here, here_places, asked.limits[i])
                if leaves.any():
                    logits[rows[leaves]] = here.logits.numpy()[here_places[leaves]]
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

    @staticmethod
    def leaves(found: Exit, places: np.ndarray, limit: float) -> np.ndarray:
        """(b,) bool. An infinite limit takes everybody, NaN too."""
        return (found.uncertainty.numpy()[places] < limit) | (limit == np.inf)

    def compacted(self, state: State, places: np.ndarray, lengths: np.ndarray) -> tuple[State, np.ndarray]:
        """Those that stay, in a smaller shape where there is one, and their places in it."""
        smaller = self.state(len(places), int(lengths.max()))
        if smaller.shape == state.shape:
            return state, places
        stay, width = torch.from_numpy(places).to(self.device), smaller.shape[1]
        smaller.fill(len(places), state.mask[stay, :width])
        smaller.hidden[: len(places)] = state.hidden[stay, :width]
        if state.memory is not None:
            smaller.memory = self.memory(smaller, state.memory)
            smaller.memory[: len(places)] = state.memory[stay]
        return smaller, np.arange(len(places))

    def state(self, rows: int, tokens: int) -> State:
        """The state for so many rows and tokens: the smallest shape that holds them."""
        tokens = min(next((length for length in LENGTHS if length >= tokens), tokens), max(self.longest, tokens))
        shape = (1 << (rows - 1).bit_length(), tokens)
        if shape not in self.states:
            whole = {"dtype": torch.long, "device": self.device}
            self.states[shape] = State(
                ids=torch.full(shape, self.config.pad_token_id, **whole),
                types=torch.zeros(shape, **whole),
                mask=torch.zeros(shape, **whole),
                hidden=torch.zeros(*shape, self.config.hidden_size, dtype=self.model.dtype, device=self.device),
            )
        return self.states[shape]

    @staticmethod
    def memory(state: State, like: Tensor) -> Tensor:
        """The state's memory of the rule, made where there is none yet."""
        if state.memory is None:
            state.memory = like.new_zeros(state.shape[0], *like.shape[1:])
        return state.memory

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
        state.hidden.copy_(hidden)
        if consulted:
            uncertainty, memory = rule.measure(logits, certainty, state.memory if i > 0 else None)
            found.uncertainty.copy_(uncertainty.float(), non_blocking=True)  # a copy that converts would wait
            if memory is not None:
                self.memory(state, memory).copy_(memory)
        if consulted or last:
            found.logits.copy_(logits.float(), non_blocking=True)

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
