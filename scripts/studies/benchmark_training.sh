#!/usr/bin/env bash
# Training here beside a plain loop as the original's and transformers.Trainer: samples per second by stage. Some 10 minutes
# for a model of 6 layers on two cores. With --seeds 1 2 3 also that many trainings to the end, and their dev scores.
# Settings: as for train_deebert.sh; further arguments go to benchmark_training.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
settings "$@"
need_data

"$PYTHON" -u "$ROOT/scripts/studies/benchmark_training.py" "${DATA[@]}" --model_name_or_path "$MODEL_NAME" \
    "${RECIPE[@]}" "$@"
