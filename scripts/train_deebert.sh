#!/usr/bin/env bash
# Two-stage fine-tuning: with the paper's recipe on a GLUE task, with better off-ramps (--recipe fast) on own data.
# Every setting can be given from the environment:
#   TRAIN_FILE=tickets.csv bash scripts/train_deebert.sh
#   PATH_TO_DATA=~/glue_data DATASET=SST-2 MODEL_TYPE=roberta bash scripts/train_deebert.sh
# Further arguments go to run_glue_deebert.py and win over the recipe's: bash scripts/train_deebert.sh --seed 1
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
settings "$@"
need_data

run_glue --model_name_or_path "$MODEL_NAME" --do_train --do_eval --eval_after_first_stage "${RECIPE[@]}" "$@"
