#!/usr/bin/env bash
# Predictions of a trained model for GLUE's test set -> SUBMISSION_DIR/full.zip, the same at the threshold that the model
# stores (stored.zip), and at each of ENTROPIES. Tasks share SUBMISSION_DIR: a zip holds all that was predicted so far.
# Settings: as for train_deebert.sh; further arguments go to paper/predict_glue.py.
#   for task in SST-2 MRPC; do DATASET=$task ENTROPIES="0.1 0.3" bash scripts/predict_glue.sh; done
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
settings
[ -n "${DATASET:-}" ] || fail "GLUE has test sets for a task in PATH_TO_DATA: unset TRAIN_FILE, VALIDATION_FILE and TEST_FILE"
need_data
need_model
SUBMISSION_DIR=${SUBMISSION_DIR:-./submissions/$MODEL_TYPE-$MODEL_SIZE}

# shellcheck disable=SC2086  # one argument for each threshold
"$PYTHON" -u "$ROOT/scripts/paper/predict_glue.py" --model "$OUTPUT_DIR" --task_name "$DATASET" \
    --data_dir "$PATH_TO_DATA/$DATASET" --submission_dir "$SUBMISSION_DIR" ${ENTROPIES:+--exit_threshold $ENTROPIES} "$@"
