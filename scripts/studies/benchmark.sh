#!/usr/bin/env bash
# Early exit against the full model in PyTorch, compiled, and in ONNX Runtime: latency and throughput on a dev set.
# Settings: as for train_deebert.sh; further arguments go to benchmark.py. All on the CPU, or with --device cuda.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
no_own_files
settings
need_data
need_model

"$PYTHON" -u "$ROOT/scripts/studies/benchmark.py" --model "$OUTPUT_DIR" --task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET" \
    --output_dir "$RESULTS_DIR/$OUTPUT_DIR/benchmark" "$@"
