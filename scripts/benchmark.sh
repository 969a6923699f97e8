#!/usr/bin/env bash
# Early exit against the full model in PyTorch, compiled, and in ONNX Runtime: latency and throughput on a dev set.
# Settings: as for train_deebert.sh; further arguments go to python -m deebert benchmark. All on the CPU, or with --device cuda.
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}
MODEL_TYPE=${MODEL_TYPE:-bert}  # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
DATASET=${DATASET:-MRPC}        # a task of deebert/data/tasks.py
OUTPUT_DIR=${OUTPUT_DIR:-./saved_models/$MODEL_TYPE-$MODEL_SIZE/$DATASET/two_stage}
RESULTS_DIR=${RESULTS_DIR:-./results/}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
no_own_files
need_data
need_model
need_requirements
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -m deebert benchmark --model "$OUTPUT_DIR" --task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET" \
    --output_dir "$RESULTS_DIR/$OUTPUT_DIR/benchmark" "$@"
