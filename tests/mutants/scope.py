"""Where faults are put, and which tests look for them: those that concern a file, the nearest and quickest first."""

RANDOM = "fuzz/test_fuzz::test_pytorch"  # random models against a brute force: some seconds, and most faults
DECISIONS = f"{RANDOM} modeling/test_early_exit modeling/test_exit_rules modeling/test_classifier"
STREAMS = "runtime/test_several_labels"
ENCODERS = f"{RANDOM} modeling/test_early_exit modeling/test_classifier modeling/test_auto_classes test_encoders"
FOLDERS = "modeling/test_classifier hostile/test_model_folders"
LOADERS = "modeling/test_auto_classes runtime/test_text_classifier"
SELECTION = "evaluation/test_threshold_selection modeling/test_exit_rules runtime/test_several_labels"
EVALUATION = "evaluation/test_all_exits evaluation/test_cost"
TRAINING = "training/test_strategies training/test_train_data training/test_stage"
RESUMED = "experiment/test_resume experiment/test_processes"

BY_FILE = {
    "modeling/auto_classes.py": "modeling/test_classifier modeling/test_auto_classes test_encoders",
    "modeling/backbones/__init__.py": ENCODERS,
    "modeling/backbones/bert.py": ENCODERS,
    "modeling/backbones/camembert.py": ENCODERS,
    "modeling/backbones/distilbert.py": ENCODERS,
    "modeling/backbones/electra.py": ENCODERS,
    "modeling/backbones/modernbert.py": ENCODERS,
    "modeling/backbones/roberta.py": ENCODERS,
    "modeling/backbones/xlm_roberta.py": ENCODERS,
    "modeling/checkpoints.py": f"{FOLDERS} test_encoders {LOADERS} commands/test_predict",
    "modeling/classifier.py": f"{DECISIONS} {EVALUATION} {TRAINING} {STREAMS} test_encoders",
    "modeling/config.py": f"{DECISIONS} {FOLDERS} test_encoders {STREAMS} modeling/test_auto_classes",
    "modeling/early_exit.py": f"{DECISIONS} {STREAMS} runtime/test_cuda_graphs runtime/test_onnx",
    "modeling/encoder.py": f"{DECISIONS} {EVALUATION} {STREAMS} test_encoders",
    "modeling/exit_rules.py": f"{DECISIONS} {SELECTION} runtime/test_onnx",
    "modeling/first_token.py": f"{DECISIONS} {EVALUATION} test_encoders",
    "modeling/modeling_deebert.py": "modeling/test_auto_classes",
    "modeling/off_ramps.py": f"{DECISIONS} {EVALUATION} {TRAINING} test_encoders",
    "evaluation/threshold_selection.py": f"{SELECTION} experiment/test_driver",
    "evaluation/risk_control.py": SELECTION,
    "training/strategies.py": f"{TRAINING} runtime/test_several_labels experiment/test_driver",
    "training/losses.py": f"{TRAINING} runtime/test_several_labels experiment/test_driver",
    "training/checkpointing.py": f"{RESUMED} experiment/test_driver",
    "data/batching.py": f"data/test_features {EVALUATION} {TRAINING} {RESUMED}",
}


def node_id(name: str) -> str:
    file, *test = name.split("::")
    return "::".join([f"tests/{file}.py", *test])


TESTS = {f"deebert/{path}": tuple(dict.fromkeys(map(node_id, names.split()))) for path, names in BY_FILE.items()}

LEFT_OUT = (  # exports and processes, which take as long as all others together
    "tests/test_encoders.py::test_an_export_gives_the_same_exits",
    "tests/modeling/test_auto_classes.py::test_in_a_process_of_its_own",
    "tests/commands/test_predict.py::test_a_reader_that_has_seen_enough_is_no_error",
)

ENCODER_TYPES = ("bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm_roberta")
IMPORTS = (  # of the tests: what takes long, once for all processes
    *("accelerate", "fastapi.testclient", "hypothesis", "matplotlib.pyplot", "onnxruntime", "onnxscript", "pytest"),
    *("scipy.stats", "sklearn.metrics", "tensorboardX", "torch", "torch.onnx", "torch._dynamo"),
    *("transformers.modeling_utils", "transformers.pipelines", "transformers.trainer_pt_utils"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ENCODER_TYPES),
)
