#!/usr/bin/env bash
# The score of every exit of a trained model -> each_layer.npy, each_layer.csv and all_exits.npz.
# Settings and further arguments: as for train_deebert.sh.
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}
MODEL_TYPE=${MODEL_TYPE:-bert}  # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
DATASET=${DATASET:-MRPC}        # SST-2, MRPC, RTE, QNLI, QQP, MNLI, CoLA, WNLI, STS-B or Ratings
OUTPUT_DIR=${OUTPUT_DIR:-./saved_models/$MODEL_TYPE-$MODEL_SIZE/$DATASET/two_stage}
RESULTS_DIR=${RESULTS_DIR:-./results/}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_data
need_model

run_glue --model_name_or_path "$OUTPUT_DIR" --do_eval --eval_each_highway "$@"
