"""What frontier.py compares: early exit, the full models, smaller models, and what a practitioner would pick instead.

Each takes texts and gives labels; what a user pays is inside: tokens, the model, the largest logit. All encoders have
the same tokenizer's code, and ONNX Runtime, PyTorch and scikit-learn the number of threads that they choose by default.
Shapes: B texts of a batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import static_models
import torch
from frozen_encoder import mean_features
from full_graphs import runner, stock_model, strongest_graphs
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from deebert import Classifier
from deebert.data.batching import collator, tokenize
from deebert.data.encoding import EncodedTexts, TextEncoder
from deebert.data.tasks import Example, Task, label_order
from deebert.evaluation.all_exits import AllExits, dense_thresholds, run_all_exits
from deebert.modeling.checkpoints import encoding_facts, load_config, load_tokenizer
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.exported import is_exported
from deebert.runtime.onnx_export import traced_parts, write_export
from deebert.utils.files import replacing

Texts = list[tuple[str, ...]]
THRESHOLDS = 12
SET_FIT_STEPS = 500
AUTOTUNE = 60
PYTORCH, FP32, INT8, OTHER = "PyTorch", "ONNX fp32", "ONNX int8", "other"
EARLY, FULL, STATIC = "early exit", "full model", "smaller model"


@dataclass(frozen=True)
class Contender:
    """A way to classify texts.

    kind: EARLY, FULL, STATIC or a peer's. model: its name; of a peer that of its encoder. predict: texts (B) to indices
    (B,) of the task's labels. threshold: of EARLY.
    """

    kind: str
    model: str
    runtime: str
    predict: Callable[[Texts], np.ndarray]
    threshold: float | None = None

    @property
    def name(self) -> str:
        at = "" if self.threshold is None else f" at {self.threshold:g}"
        return f"{', '.join(filter(None, (self.kind, self.model, self.runtime)))}{at}"


@dataclass(frozen=True)
class Study:
    """The task and its texts. batches: by size, some to choose graphs by. folder: where exports and graphs are kept."""

    task: Task
    train: list[Example]
    scored: list[Example]
    max_tokens: int
    batches: dict[int, list[Texts]]
    folder: Path

    @property
    def labels(self) -> np.ndarray:
        return np.array([example.label for example in self.train])

    def encoder(self, folder: str) -> TextEncoder:
        """Texts to tokens, as the `Classifier` encodes them."""
        tokenizer = load_tokenizer(folder)
        facts = encoding_facts(load_config(folder), tokenizer)
        longest = min(self.max_tokens, facts["max_tokens"])
        return TextEncoder(tokenizer.backend_tokenizer, **facts | {"max_tokens": longest})

    def predict(self, encode: TextEncoder, run: Callable[[dict], np.ndarray], config=None) -> Callable:
        """`Contender.predict` of a model whose inputs are arrays. config: of a model with its own order of labels."""
        order = label_order(self.task, config.model_type, config.id2label) if config else self.task.labels
        numbers = np.array([self.task.labels.index(label) for label in order])

        def predict(texts: Texts) -> np.ndarray:
            return numbers[run(padded(encode(texts))).argmax(axis=1)]

        return predict


def text_tuples(examples: list[Example]) -> Texts:
    return [example.texts for example in examples]


def joined(examples: list[Example]) -> list[str]:
    return [" ".join(text) for text in text_tuples(examples)]


def library(name: str) -> ModuleType | None:
    """A peer's library; None, with a note, where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        print(f"note: {name} is not installed, so its models are left out", flush=True)
        return None


def padded(encoded: EncodedTexts) -> dict[str, np.ndarray]:
    return encoded.padded(range(len(encoded)))


def early_exit(study: Study, name: str, folder: str) -> Iterator[Contender]:
    """A trained model without exits and at THRESHOLDS, in each runtime; and its full model without off-ramps."""
    classify, exports = Classifier(folder, max_seq_length=study.max_tokens), study.folder / "exports" / name
    model, config = classify.runtime.model, classify.config
    if not (exports / "all_exits.npz").is_file():
        print(f"{name}: exports, and one pass for the thresholds", flush=True)
        with traced_parts(model) as parts:
            for precision in ("fp32", "int8"):
                if not is_exported(exports / precision):
                    write_export(parts, config, load_tokenizer(folder), exports / precision, precision == "int8")
        unlabelled = [replace(example, label=None) for example in study.scored]
        features = tokenize(unlabelled, load_tokenizer(folder), study.max_tokens)
        run_all_exits(model, features, collator(config), progress=False).save(exports / "all_exits.npz")
    thresholds = [NO_EXIT, *spread(AllExits.load(exports / "all_exits.npz"), THRESHOLDS)]
    folders = {PYTORCH: folder, FP32: exports / "fp32", INT8: exports / "int8"}
    for way, runtime in ((way, Classifier(str(each)).runtime) for way, each in folders.items()):
        for x in thresholds:
            run = lambda batch, model=runtime, x=x: model(**batch, exit_threshold=x).logits  # noqa: E731
            yield Contender(EARLY, name, way, study.predict(classify.encode, run, config), x)
    yield Contender(FULL, name, PYTORCH, study.predict(classify.encode, in_pytorch(stock_model(folder, model)), config))
    yield from in_onnx(study, FULL, name, classify.encode, model, config)


def spread(exits: AllExits, number: int) -> list[float]:
    """Up to this many thresholds, safest first, that save the cost of these samples in equal steps."""
    thresholds = np.array(dense_thresholds(exits))
    saved = np.array([1 - exits.cost(exits.exit_layers(x), x) for x in thresholds])
    steps = np.linspace(0, saved.max(), number + 1)[1:]
    return list(dict.fromkeys(float(thresholds[np.argmax(saved >= step - 1e-9)]) for step in steps))


def in_pytorch(model: nn.Module) -> Callable[[dict], np.ndarray]:
    """Hugging Face's model as it is; other encoders than BERT take no token types."""
    types = ["token_type_ids"] if getattr(model.config, "type_vocab_size", 0) > 1 else []
    names = ["input_ids", "attention_mask", *types]

    @torch.inference_mode()
    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        return model(**{name: torch.from_numpy(batch[name]) for name in names}).logits.numpy()

    return run


def in_onnx(study: Study, kind: str, name: str, encode: TextEncoder, model, config=None) -> Iterator[Contender]:
    """A model without exits in its strongest graphs, fp32 and int8."""
    folder = study.folder / "graphs" / f"{kind}-{name}".replace(" ", "_")
    batches = {size: [padded(encode(texts)) for texts in some] for size, some in study.batches.items()}
    for precision, paths in strongest_graphs(model, batches, folder).items():
        graphs = {path: runner(path) for path in paths.values()}
        by_size = {size: graphs[path] for size, path in paths.items()}

        def run(batch: dict, by_size: dict = by_size) -> np.ndarray:
            return by_size[1 if len(batch["input_ids"]) == 1 else max(by_size)](batch)

        yield Contender(kind, name, f"ONNX {precision}", study.predict(encode, run, config))


def static(study: Study, name: str, folder: str) -> Iterator[Contender]:
    """A model of static_models.py."""
    model = static_models.load(folder)
    yield from in_onnx(study, STATIC, name, study.encoder(folder), model, load_config(folder))


class Normalized(nn.Module):
    """Vectors (B, H) to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors)


def frozen(study: Study, name: str, folder: str, kind: str = "frozen encoder") -> Iterator[Contender]:
    """Logistic regression on the mean of a frozen encoder's tokens, as the last layer of one graph."""
    config, known = AutoConfig.from_pretrained(folder), study.folder / "exports" / f"{kind.split()[0]}-{name}.npz"
    if not known.is_file():
        print(f"{kind}, {name}: features of {len(study.train):,} texts for logistic regression", flush=True)
        texts = [text if len(text) > 1 else text[0] for text in text_tuples(study.train)]
        features = mean_features(texts, folder, study.max_tokens)
        fitted = LogisticRegression(C=10, max_iter=1000).fit(features, study.labels)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(weight) == 1:  # of two labels
            weight, bias = np.stack([-weight[0], weight[0]]), np.array([-bias[0], bias[0]])
        with replacing(known, "wb") as file:
            np.savez(file, weight=weight, bias=bias)
    config.num_labels = len(study.task.labels)
    model = static_models.MeanPooledForSequenceClassification(config)
    model.encoder = AutoModel.from_pretrained(folder)
    model.encoder.pooler = None
    model.classifier = nn.Sequential(Normalized(), model.classifier)
    with np.load(known) as arrays:
        model.classifier[1].load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    yield from in_onnx(study, kind, name, study.encoder(folder), model.eval())


def set_fit(study: Study, name: str, folder: str) -> Iterator[Contender]:
    """SetFit, if it is installed (Tunstall et al., 2022): an encoder fine-tuned on pairs of texts, alike or not.

    SET_FIT_STEPS of 16 pairs, since all pairs of thousands of texts would take days. Then as `frozen`.
    """
    kept = study.folder / "exports" / f"SetFit-{name}"
    if not (kept / "model.safetensors").is_file():
        if not (installed := library("setfit")) or not (datasets := library("datasets")):
            return
        print(f"SetFit, {name}: {SET_FIT_STEPS} steps", flush=True)
        model = installed.SetFitModel.from_pretrained(folder)
        model.model_body.max_seq_length = study.max_tokens
        data = datasets.Dataset.from_dict({"text": joined(study.train), "label": study.labels})
        settings = installed.TrainingArguments(
            str(kept), batch_size=16, max_steps=SET_FIT_STEPS, save_strategy="no", report_to="none", seed=42
        )
        installed.Trainer(model=model, args=settings, train_dataset=data).train()
        AutoTokenizer.from_pretrained(folder).save_pretrained(kept)
        model.model_body[0].auto_model.save_pretrained(kept)
    yield from frozen(study, name, str(kept), "SetFit")


def tf_idf(study: Study) -> Iterator[Contender]:
    """Words and pairs of words with a linear classifier, its C by cross-validation."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1), LinearSVC())
    search = GridSearchCV(model, {"linearsvc__C": [0.1, 0.3, 1, 3]}, cv=3)
    fitted = search.fit(joined(study.train), study.labels).best_estimator_
    yield Contender("TF-IDF", "", OTHER, lambda texts: fitted.predict([" ".join(text) for text in texts]))


def fast_text(study: Study) -> Iterator[Contender]:
    """fastText, if it is installed: words and pairs of words; its settings by its own search, AUTOTUNE seconds long."""
    kept = study.folder / "exports" / "fasttext.bin"
    if not (installed := library("fasttext")):
        return
    if not kept.is_file():
        lines = [f"__label__{y} {one_line(text)}" for y, text in zip(study.labels, joined(study.train), strict=True)]
        order, held_out = np.random.default_rng(0).permutation(len(lines)), len(lines) // 10
        files = {"train": order[held_out:], "dev": order[:held_out]}
        for part, rows in files.items():
            with replacing(kept.with_suffix(f".{part}")) as file:
                file.writelines(f"{lines[i]}\n" for i in rows)
        dev, train = (str(kept.with_suffix(f".{part}")) for part in ("dev", "train"))
        installed.train_supervised(train, autotuneValidationFile=dev, autotuneDuration=AUTOTUNE).save_model(str(kept))
    model = installed.load_model(str(kept))

    def predict(texts: Texts) -> np.ndarray:
        labels, _ = model.predict([one_line(" ".join(text)) for text in texts])
        return np.array([int(first.removeprefix("__label__")) for first, *_ in labels])

    yield Contender("fastText", "", OTHER, predict)


def one_line(text: str) -> str:
    """As fastText takes it: lower case, no line breaks."""
    return " ".join(text.lower().split())


def model2vec(study: Study, name: str, folder: str) -> Iterator[Contender]:
    """Logistic regression on the mean of static vectors, which model2vec, if installed, distils from an encoder."""
    if not (distill := library("model2vec.distill")) or not (installed := library("model2vec")):
        return
    kept = study.folder / "exports" / f"model2vec-{name}"
    if not (kept / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        distill.distill_from_model(AutoModel.from_pretrained(folder), tokenizer, device="cpu").save_pretrained(kept)
    vectors = installed.StaticModel.from_pretrained(kept)
    classifier = LogisticRegression(C=10, max_iter=1000).fit(vectors.encode(joined(study.train)), study.labels)

    def predict(texts: Texts) -> np.ndarray:
        return classifier.predict(vectors.encode([" ".join(text) for text in texts]))

    yield Contender("model2vec", name, OTHER, predict)
