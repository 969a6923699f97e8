#!/usr/bin/env bash
# Two-stage fine-tuning with the paper's recipe. Every setting can be given from the environment:
#   DATASET=SST-2 MODEL_TYPE=roberta bash scripts/train_deebert.sh
# Further arguments go to run_glue_deebert.py and win over the recipe's: bash scripts/train_deebert.sh --seed 1
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}  # holds a folder of TSV files for each task
MODEL_TYPE=${MODEL_TYPE:-bert}             # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}             # base or large
DATASET=${DATASET:-MRPC}                   # SST-2, MRPC, RTE, QNLI, QQP, MNLI, CoLA, WNLI, STS-B or Ratings
OUTPUT_DIR=${OUTPUT_DIR:-./saved_models/$MODEL_TYPE-$MODEL_SIZE/$DATASET/two_stage}
RESULTS_DIR=${RESULTS_DIR:-./results/}

MODEL_NAME=${MODEL_NAME:-$MODEL_TYPE-$MODEL_SIZE$([ "$MODEL_TYPE" = bert ] && echo -uncased || true)}
EPOCHS=${EPOCHS:-$([ "$MODEL_TYPE" = bert ] && echo 3 || echo 10)}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_data

run_glue --model_name_or_path "$MODEL_NAME" --do_train --do_eval --eval_after_first_stage \
    --per_gpu_train_batch_size 8 --learning_rate 2e-5 --num_train_epochs "$EPOCHS" --save_steps 0 --seed 42 "$@"
