#!/usr/bin/env bash
# Training here against a plain loop that does what the original does: samples per second by stage, and memory.
# Settings: as for train_deebert.sh; further arguments go to benchmark_training.py (--seeds 1 2 3: scores, too).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
no_own_files
settings
need_data

"$PYTHON" -u "$ROOT/scripts/studies/benchmark_training.py" --model_type "$MODEL_TYPE" --model_name_or_path "$MODEL_NAME" \
    --task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET" "$@"
