"""Early exit in ONNX Runtime: loads what `python -m deebert.export` wrote, and answers as the PyTorch model does."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deebert.checkpoints import load_config
from deebert.errors import InputError
from deebert.exit_rules import NO_EXIT, entropy, make_rule
from deebert.highway import HighwayPass, config_rule
from deebert.modeling_highway import HighwayClassifierOutput, token_lengths

FORMAT = 3  # raise it when what the graphs take or give changes
MANIFEST, GRAPH = "deebert_onnx.json", "layers.onnx"
NO_IDS = np.empty((0, 0), np.int64)  # behind the first layer nobody reads them


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds a graph rather than a PyTorch model."""
    return Path(folder, MANIFEST).is_file() or Path(folder, GRAPH).is_file()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For PyTorch's small steps between graphs: its threads spin after work, on the cores that ONNX Runtime needs.

    Measured on two cores in batches of 32, they made half of the saving disappear.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


class OnnxDeeBert:
    """An exported model, called like `DeeBertForSequenceClassification` in evaluation: tensors in, the same output.

    While it answers, PyTorch has one thread in the whole process: servers should use processes rather than threads.
    `config` holds threshold and exit rule. threads: of ONNX Runtime, None: as many as PyTorch would take.
    Raises InputError where the folder is incomplete or of another version.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: no {MANIFEST} there, so no complete export; run python -m deebert.export")
        try:
            facts = json.loads((folder / MANIFEST).read_text())
            version, form, self.precision, layers = (facts[x] for x in ("deebert", "format", "precision", "layers"))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / MANIFEST}: damaged; run python -m deebert.export anew") from None
        if form != FORMAT:
            raise InputError(
                f"{folder}: exported by version {version} (format {form}, this one reads {FORMAT}); "
                "run python -m deebert.export anew"
            )
        self.rule = facts.get("exit_rule")  # by which the graph measures
        self.config = load_config(str(folder))
        if layers != self.config.num_hidden_layers:
            raise InputError(f"{folder}: {layers} layers, but a config.json of {self.config.num_hidden_layers} layers")
        path = folder / GRAPH
        if not path.is_file():
            raise InputError(f"{path}: no such file; the export is incomplete, run python -m deebert.export anew")
        self.session = open_session(path, threads)
        self.has_certainty = "certainty" in [output.name for output in self.session.get_outputs()]
        if config_rule(self.config).learned and not self.has_certainty:
            raise InputError(f"{folder}: exported without --exit_rule learned, so it cannot exit by it")

    def eval(self) -> "OnnxDeeBert":
        """Nothing to do: there is no training mode. For code that is written for PyTorch models."""
        return self

    def set_early_exit_entropy(self, value: float | Sequence[float]) -> None:
        """Sets the threshold. Raises ValueError (see `ExitRule.limits`)."""
        config_rule(self.config).limits(value, self.config.num_hidden_layers)
        self.config.early_exit_entropy = value

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule and threshold for this object; nothing is stored. Raises ValueError."""
        rule = make_rule(name, self.config.num_labels, self.config.patience_tolerance)
        rule.limits(threshold, self.config.num_hidden_layers)
        rule.check_head(self.has_certainty)
        self.config.exit_rule, self.config.early_exit_entropy = name, threshold

    def step(
        self, i: int, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layer i with the exit behind it, as `HighwayClassifier.step`."""
        everywhere = [math.inf] * (self.config.num_hidden_layers - 1)
        _, hidden, logits, _, certainty = self.run(i, everywhere, inputs, attention_mask, token_type_ids)
        return hidden, logits, certainty

    def run(
        self,
        i: int,
        limits: Sequence[float],
        inputs: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor | None]:
        """Layer i, from 0, and those behind it, up to the first where an uncertainty is below its limit, of N-1.

        Inputs as for `HighwayClassifier.step`. Returns the layer where it ended, from 0, and its hidden states
        (b, T, H), logits (b, C), uncertainty (b,) by the graph's rule, and the learning-to-exit head's certainty (b,),
        None without one.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            feed = {"attention_mask": attention_mask.long().numpy(), "limits": np.array(limits, np.float32)}
        if i == 0:
            types = torch.zeros_like(inputs) if token_type_ids is None else token_type_ids
            feed |= {"input_ids": inputs.long().numpy(), "token_type_ids": types.long().numpy()}
        else:
            feed |= {"layer": np.array(i), "hidden_in": inputs.numpy(), "input_ids": NO_IDS, "token_type_ids": NO_IDS}
        layer, *found = self.session.run(None, feed)
        hidden, logits, uncertainty, certainty = (*map(torch.from_numpy, found), None)[:4]
        return int(layer) - 1, hidden, logits, uncertainty, certainty

    @one_torch_thread()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_all_exits: bool = False,
        early_exit_entropy: float | Sequence[float] | None = None,
    ) -> HighwayClassifierOutput:
        """Classifies a batch (B, T); arguments and output as in `HighwayClassifier.forward`. Raises ValueError."""
        if len(input_ids) == 0:
            raise ValueError("there is nothing to classify")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rule, threshold = config_rule(self.config), self.config.early_exit_entropy
        threshold = threshold if early_exit_entropy is None else early_exit_entropy
        limits = rule.limits(threshold, self.config.num_hidden_layers)
        measured = rule.name == self.rule and not rule.remembers and not output_all_exits
        if measured and len(input_ids) == 1:  # leaves where the run ends
            layer, _, logits, uncertainty, _ = self.run(0, limits, input_ids, mask, token_type_ids)
            if not math.isnan(uncertainty.item()):
                exit_layer = torch.from_numpy(np.array([layer + 1]))
                nats = uncertainty if rule.name == "entropy" else entropy(logits)
                return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=nats)
        exits = HighwayPass(rule, limits, full=output_all_exits, lengths=token_lengths(attention_mask))
        stops = limits  # another rule's uncertainties are measured here: behind each layer that it asks
        if not measured:
            stops = [math.inf if exits.asks(i) else NO_EXIT for i in range(len(limits))]
        state, layer = input_ids, -1
        while layer < len(limits) and len(state):
            layer, state, logits, uncertainty, certainty = self.run(layer + 1, stops, state, mask, token_type_ids)
            if layer < len(limits):
                state, mask = exits.exit(layer, logits, certainty, state, mask, uncertainty if measured else None)
        logits = logits[: len(state)]  # of those who went through all layers
        all_logits = all_certainties = None
        if output_all_exits:
            logits, exit_layer, all_logits, all_certainties = exits.collect_all(logits)
        else:
            logits, exit_layer = exits.collect(logits)
        return HighwayClassifierOutput(
            logits=logits,
            exit_layer=exit_layer,
            entropy=entropy(logits),
            all_logits=all_logits,
            all_certainties=all_certainties,
        )
