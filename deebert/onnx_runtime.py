"""Early exit in ONNX Runtime: loads what `python -m deebert.export` wrote, and answers as the PyTorch model does."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from deebert.checkpoints import load_config
from deebert.errors import InputError
from deebert.exit_rules import NO_EXIT, entropy, make_rule
from deebert.highway import HighwayPass, config_rule
from deebert.modeling_highway import HighwayClassifierOutput, token_lengths

FORMAT = 1  # raise it when what the graphs take or give changes
MANIFEST = "deebert_onnx.json"


def graph_file(i: int) -> str:
    """The name of layer i's graph, i from 0."""
    return f"layer_{i + 1}.onnx"


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds graphs rather than a PyTorch model."""
    return Path(folder, MANIFEST).is_file() or Path(folder, graph_file(0)).is_file()


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


class OnnxDeeBert:
    """An exported model, called like `DeeBertForSequenceClassification` in evaluation: tensors in, the same output.

    While it answers, PyTorch has one thread in the whole process: servers should use processes rather than threads.
    `config` holds threshold and exit rule. threads: of ONNX Runtime, None: as many as PyTorch would take.
    Raises InputError where the folder is incomplete or of another version.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                "ONNX Runtime is missing: pip install 'deebert[onnx]', or pip install onnxruntime"
            ) from None
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
        self.config = load_config(str(folder))
        if layers != self.config.num_hidden_layers:
            raise InputError(f"{folder}: {layers} graphs, but a config.json of {self.config.num_hidden_layers} layers")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # the threads of one layer's session must not spin on the cores while the next layer's work
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.sessions = []
        for i in range(self.config.num_hidden_layers):
            path = folder / graph_file(i)
            if not path.is_file():
                raise InputError(f"{path}: no such file; the export is incomplete, run python -m deebert.export anew")
            try:
                self.sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
            except Exception as error:  # onnxruntime's own classes have no common base
                raise InputError(f"{path}: not a graph that ONNX Runtime can read ({error})") from None
        self.has_certainty = "certainty" in [output.name for output in self.sessions[0].get_outputs()]
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
        if rule.learned and not self.has_certainty:
            raise ValueError(f"the exit rule {name} needs a model trained with it: there is no learning-to-exit head")
        self.config.exit_rule, self.config.early_exit_entropy = name, threshold

    def step(
        self, i: int, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Layer i with the exit behind it, as `HighwayClassifier.step`; the last hidden states are None."""
        feed = {"inputs": inputs, "attention_mask": attention_mask}
        if i == 0:
            feed["token_type_ids"] = torch.zeros_like(inputs) if token_type_ids is None else token_type_ids
        feed = {name: (x if x.is_floating_point() else x.long()).numpy() for name, x in feed.items()}
        outputs = [torch.from_numpy(array) for array in self.sessions[i].run(None, feed)]
        if i == len(self.sessions) - 1:
            return None, outputs[0], None
        return (*outputs, None)[:3]

    @torch.inference_mode()
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
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rule, threshold = config_rule(self.config), self.config.early_exit_entropy
        limits = rule.limits(threshold if early_exit_entropy is None else early_exit_entropy, len(self.sessions))
        exits = HighwayPass(rule, limits, full=output_all_exits, lengths=token_lengths(attention_mask))
        state = input_ids
        for i in range(len(self.sessions)):
            state, logits, certainty = self.step(i, state, mask, token_type_ids)
            if not exits.asks(i):
                continue
            state, mask = exits.exit(i, logits, certainty, state, mask)
            if len(state) == 0:
                logits = logits[:0]
                break
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
