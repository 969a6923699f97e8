#!/usr/bin/env bash
# Training here against a plain loop that does what the original does: samples per second by stage, and memory.
# Settings: as for train_deebert.sh; further arguments go to benchmark_training.py (--seeds 1 2 3: scores, too).
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}
MODEL_TYPE=${MODEL_TYPE:-bert}  # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
DATASET=${DATASET:-MRPC}        # SST-2, MRPC, RTE, QNLI, QQP, MNLI, CoLA, STS-B, WNLI or Ratings
MODEL_NAME=${MODEL_NAME:-$MODEL_TYPE-$MODEL_SIZE$([ "$MODEL_TYPE" = bert ] && echo -uncased || true)}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
no_own_files
need_data
need_requirements

"$PYTHON" -u "$ROOT/scripts/benchmark_training.py" --model_type "$MODEL_TYPE" --model_name_or_path "$MODEL_NAME" \
    --task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET" "$@"
