#!/usr/bin/env bash
# Early exit at a row of thresholds, timed -> entropy_{threshold}.npy, entropy_sweep.csv and entropy_curve.csv.
# Settings and further arguments: as for train_deebert.sh. One process does them all; batch size 1 as in the paper.
#   ENTROPIES="0.05 0.15" bash scripts/entropy_eval.sh --exit_rule confidence
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
settings
need_data
need_model
# Thresholds of the exit rule; of patience 1 2 3 ... With own data, which may have many labels, those that save 10, 20,
# ... 90 % of the cost of the dev set.
ENTROPIES=${ENTROPIES:-${DATASET:+0 0.1 0.2 0.3 0.4 0.5 0.6 0.7}}

# shellcheck disable=SC2086  # one argument for each threshold
run_glue --model_name_or_path "$OUTPUT_DIR" --do_eval --eval_highway ${ENTROPIES:+--exit_threshold $ENTROPIES} \
    --per_gpu_eval_batch_size 1 "$@"
