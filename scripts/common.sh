# Sourced by the other scripts: where the code is, which Python runs it, and how errors are reported.

ROOT=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

# The active virtual environment's Python, else the checkout's own .venv, else the python3 of the system.
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    PYTHON=${PYTHON:-python}
elif [ -x "$ROOT/.venv/bin/python" ]; then
    PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
else
    PYTHON=${PYTHON:-python3}
fi

# python_in_venv REQUIREMENTS: makes .venv unless an environment is active, and installs REQUIREMENTS once.
python_in_venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed: set PYTHON to one$([ -d "$ROOT/.venv" ] && echo " and remove $ROOT/.venv")"
    if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
        if [ ! -x "$ROOT/.venv/bin/python" ]; then
            "$PYTHON" -m venv "$ROOT/.venv" || { rm -rf "$ROOT/.venv"; fail "$PYTHON -m venv does not work here"; }
        fi
        PYTHON=$ROOT/.venv/bin/python
    fi
    local stamp
    stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.deebert-$(cat "$@" | cksum | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        echo "installing $* into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || fail "pip install failed"
        touch "$stamp"
    fi
}

# settings FLAGS: what the environment leaves open. TRAIN_FILE, with VALIDATION_FILE and TEST_FILE, takes the place of
# DATASET, which names a task in PATH_TO_DATA. Sets NAME, after which folders are named, and RESULTS, the folder of the
# model's results: below RESULTS_DIR, or beside the model; DATA and RECIPE are flags of run_glue. FLAGS: of the script's
# user, who may want the fast recipe in place of the paper's.
settings() {
    local given=${MODEL_TYPE:-}
    MODEL_TYPE=${MODEL_TYPE:-bert}  # names folders; where it is set, the checkpoint has to be one of this type
    MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
    if [ -n "${TRAIN_FILE:-}${VALIDATION_FILE:-}${TEST_FILE:-}" ]; then
        [ -z "${DATASET:-}" ] || fail "DATASET=$DATASET and a file of your own: unset DATASET, or" \
            "TRAIN_FILE, VALIDATION_FILE and TEST_FILE"
        NAME=$(basename "${TRAIN_FILE:-${OUTPUT_DIR:-model}}") NAME=${NAME%.*}
        if [ "$NAME" = train ] && [ -n "${TRAIN_FILE:-}" ]; then  # many files are called that
            [ -d "$(dirname "$TRAIN_FILE")" ] || fail "TRAIN_FILE=$TRAIN_FILE: no such file"
            NAME=$(basename "$(CDPATH="" cd -- "$(dirname "$TRAIN_FILE")" && pwd)")
        fi
        DATA=(${TRAIN_FILE:+--train_file "$TRAIN_FILE"} ${VALIDATION_FILE:+--validation_file "$VALIDATION_FILE"}
            ${TEST_FILE:+--test_file "$TEST_FILE"})
        FOLDER=$NAME
    else
        RESULTS_DIR=${RESULTS_DIR:-./results/}
        PATH_TO_DATA=${PATH_TO_DATA:-./glue_data} DATASET=${DATASET:-MRPC}  # a task of deebert/data/tasks.py
        NAME=$DATASET DATA=(--task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET")
        FOLDER=$MODEL_TYPE-$MODEL_SIZE/$NAME
        [ -n "$given" ] || [ -z "${MODEL_NAME:-}" ] || FOLDER=$(basename "$MODEL_NAME")/$NAME  # it may be any encoder
    fi
    MODEL_NAME=${MODEL_NAME:-$MODEL_TYPE-$MODEL_SIZE$([ "$MODEL_TYPE" = bert ] && echo -uncased || true)}
    OUTPUT_DIR=${OUTPUT_DIR:-./saved_models/$FOLDER/two_stage}
    RESULTS=${RESULTS_DIR:+$RESULTS_DIR/$OUTPUT_DIR} RESULTS=${RESULTS:-$OUTPUT_DIR/results}
    if [[ -n ${DATASET:-} && " $* " =~ " --recipe"[\ =]"fast " ]]; then
        RECIPE=(--save_steps 0 --num_train_epochs "${EPOCHS:-3}")
    elif [ -n "${DATASET:-}" ]; then
        RECIPE=("${PAPER_RECIPE[@]}" --num_train_epochs "${EPOCHS:-$(paper_epochs "$MODEL_TYPE" "$MODEL_NAME")}")
    else
        RECIPE=(--save_steps 500 --save_total_limit 1 ${EPOCHS:+--num_train_epochs "$EPOCHS"})  # all else as --recipe fast
    fi
    [ -z "$given" ] || DATA+=(--model_type "$given")
}

# need_data: own files have to be there, or DATASET has to be a task with a folder of TSV files.
need_data() {
    local tasks file
    need_requirements
    for file in TRAIN_FILE VALIDATION_FILE TEST_FILE; do
        [ -z "${!file:-}" ] || [ -f "${!file}" ] || fail "$file=${!file}: no such file"
    done
    [ -n "${DATASET:-}" ] || return 0
    tasks=$(PYTHONPATH=$ROOT "$PYTHON" -c 'from deebert.data.tasks import TASKS; print(*TASKS, sep=", ")')
    case ", $tasks, " in
        *", $DATASET, "*) ;;
        *) fail "DATASET=$DATASET is none of $tasks; with your own data set TRAIN_FILE to a CSV, TSV or JSONL file" ;;
    esac
    [ -d "$PATH_TO_DATA/$DATASET" ] || fail "no data in $PATH_TO_DATA/$DATASET: set PATH_TO_DATA to the folder that" \
        "holds $DATASET, or TRAIN_FILE to a file of your own, or fetch it (with the package datasets):" \
        "PYTHONPATH=$ROOT $PYTHON -m deebert download $DATASET --data_dir $PATH_TO_DATA"
}

# need_model: OUTPUT_DIR has to hold a trained model.
need_model() {
    [ -f "$OUTPUT_DIR/config.json" ] || fail "no trained model in $OUTPUT_DIR: run scripts/train_deebert.sh with the" \
        "same settings, from the same folder, or set OUTPUT_DIR"
}

# Looks for the packages without importing them, which takes seconds.
need_requirements() {
    "$PYTHON" -c 'import importlib.util as i, sys
names = "accelerate", "tensorboardX", "torch", "transformers"
sys.exit(not all(i.find_spec(name) for name in names))' ||
        fail "$PYTHON lacks the requirements: activate your environment, or $PYTHON -m pip install -r $ROOT/requirements.txt"
}

# The paper's training, and its epochs of each stage, which depend on the type or the name of the model.
PAPER_RECIPE=(--per_gpu_train_batch_size 8 --learning_rate 2e-5 --save_steps 0)
paper_epochs() { case "$*" in *roberta*) echo 10 ;; *) echo 3 ;; esac; }

run_glue() {
    "$PYTHON" -u "$ROOT/run_glue_deebert.py" "${DATA[@]}" --output_dir "$OUTPUT_DIR" \
        ${RESULTS_DIR:+--plot_data_dir "$RESULTS_DIR"} "$@"
}
