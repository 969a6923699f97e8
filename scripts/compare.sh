#!/usr/bin/env bash
# Trains and sweeps a list of settings with several seeds; writes one table and one figure (comparison.md, .csv, .png,
# .pdf), and tables beside baselines (frontier.md). Run again, it resumes an interrupted training and reuses what is
# finished.
#   SETTINGS=my_settings.txt SEEDS="1 2 3" bash scripts/compare.sh
# The variables below are those of train_deebert.sh; further arguments are passed to every run.
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}
MODEL_TYPE=${MODEL_TYPE:-bert}  # bert or roberta
MODEL_SIZE=${MODEL_SIZE:-base}  # base or large
DATASET=${DATASET:-MRPC}        # a task of deebert/data/tasks.py
MODEL_NAME=${MODEL_NAME:-$MODEL_TYPE-$MODEL_SIZE$([ "$MODEL_TYPE" = bert ] && echo -uncased || true)}
EPOCHS=${EPOCHS:-$([ "$MODEL_TYPE" = bert ] && echo 3 || echo 10)}
SEEDS=${SEEDS:-1 2 3}
COMPARISON_DIR=${COMPARISON_DIR:-./comparison/$DATASET}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SETTINGS=${SETTINGS-$ROOT/scripts/compare_settings.txt}  # lines "name: flags of run_glue_deebert.py"
no_own_files
need_data
need_requirements

# shellcheck disable=SC2086  # one argument for each seed
"$PYTHON" -u "$ROOT/scripts/compare.py" ${SETTINGS:+--settings "$SETTINGS"} --seeds $SEEDS --comparison_dir "$COMPARISON_DIR" \
    --model_type "$MODEL_TYPE" --task_name "$DATASET" --data_dir "$PATH_TO_DATA/$DATASET" \
    --model_name_or_path "$MODEL_NAME" --max_seq_length 128 --per_gpu_train_batch_size 8 --learning_rate 2e-5 \
    --num_train_epochs "$EPOCHS" --save_steps 0 "$@"
