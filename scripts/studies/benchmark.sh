#!/usr/bin/env bash
# Early exit against the full model and static models in PyTorch, compiled and, on a GPU, as CUDA graphs: milliseconds and
# scores on a dev set, in one run with random turns.
#   bash scripts/studies/benchmark.sh --samples 300 --static static3    (made by static_models.py)
# Settings: as for train_deebert.sh; further arguments go to benchmark.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
settings
need_data
need_model

"$PYTHON" -u "$ROOT/scripts/studies/benchmark.py" "${DATA[@]}" --output_dir "$OUTPUT_DIR" \
    --benchmark_dir "$RESULTS/benchmark" "$@"
