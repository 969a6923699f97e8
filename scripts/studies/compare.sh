#!/usr/bin/env bash
# Trains and sweeps a list of settings with several seeds; writes one table and one figure (comparison.md, .csv, .png,
# .pdf), and early exit beside smaller models (frontier.md). Takes a training for each setting and seed; run again, it
# resumes an interrupted training and reuses what is finished.
#   SETTINGS=my_settings.txt SEEDS="1 2 3" bash scripts/studies/compare.sh
#   SETTINGS= bash scripts/studies/compare.sh --highway_pooling mean       one setting
# The variables below are those of train_deebert.sh; further arguments are passed to every run.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
settings "$@"
need_data

SETTINGS=${SETTINGS-$ROOT/scripts/studies/compare_settings.txt}  # lines "name: flags", see compare.py
SEEDS=${SEEDS:-1 2 3}
COMPARISON_DIR=${COMPARISON_DIR:-./comparison/$NAME}

# shellcheck disable=SC2086  # one argument for each seed
"$PYTHON" -u "$ROOT/scripts/studies/compare.py" ${SETTINGS:+--settings "$SETTINGS"} --seeds $SEEDS \
    --comparison_dir "$COMPARISON_DIR" "${DATA[@]}" --model_name_or_path "$MODEL_NAME" \
    "${RECIPE[@]}" "$@"
