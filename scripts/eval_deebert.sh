#!/usr/bin/env bash
# The score of every exit of a trained model -> each_layer.npy, each_layer.csv and all_exits.npz.
# Settings and further arguments: as for train_deebert.sh.
#   TRAIN_FILE=tickets.csv bash scripts/eval_deebert.sh --target_drop 0.01
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
settings
need_data
need_model

run_glue --model_name_or_path "$OUTPUT_DIR" --do_eval --eval_each_highway "$@"
