#!/usr/bin/env bash
# Early exit at a row of thresholds, timed -> entropy_{threshold}.npy, entropy_sweep.csv and entropy_curve.csv.
# Settings and further arguments: as for train_deebert.sh. One process does them all; batch size 1 as in the paper.
#   ENTROPIES="0.05 0.15" bash scripts/entropy_eval.sh --timing_repeats 5
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}
MODEL_TYPE=${MODEL_TYPE:-bert}  # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
DATASET=${DATASET:-MRPC}        # SST-2, MRPC, RTE, QNLI, QQP, MNLI, CoLA, WNLI, STS-B or Ratings
OUTPUT_DIR=${OUTPUT_DIR:-./saved_models/$MODEL_TYPE-$MODEL_SIZE/$DATASET/two_stage}
RESULTS_DIR=${RESULTS_DIR:-./results/}
ENTROPIES=${ENTROPIES:-0 0.1 0.2 0.3 0.4 0.5 0.6 0.7}  # thresholds of the exit rule; of patience 1 2 3 ...

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_data
need_model

# shellcheck disable=SC2086  # one argument for each threshold
run_glue --model_name_or_path "$OUTPUT_DIR" --do_eval --eval_highway --exit_threshold $ENTROPIES \
    --per_gpu_eval_batch_size 1 "$@"
