#!/usr/bin/env bash
# Draws figures (PNG and PDF) from the files of eval_deebert.sh and entropy_eval.sh, CSV or npy; the original's npy
# files (each_layer.npy, entropy_*.npy) will do.
#   bash scripts/plot_results.sh                   every result folder under RESULTS_DIR, each with its own figures; with
#                                                  TRAIN_FILE, as in the training, those of its model
#   bash scripts/plot_results.sh FOLDER FOLDER     these folders, together in one set of figures
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
settings
RESULTS_DIR=${RESULTS_DIR:-$OUTPUT_DIR}
FIGURES_DIR=${FIGURES_DIR:-$RESULTS_DIR/figures}  # for FOLDER arguments; without them: beside the results
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if [ $# -gt 0 ]; then
    exec "$PYTHON" -m deebert plot --output_dir "$FIGURES_DIR" "$@"
fi
[ -d "$RESULTS_DIR" ] || fail "no results in $RESULTS_DIR: run scripts/eval_deebert.sh and scripts/entropy_eval.sh, or set RESULTS_DIR"
drawn=0
while IFS= read -r folder; do
    drawn=1
    "$PYTHON" -m deebert plot --output_dir "$folder" "$folder"
done < <(find "$RESULTS_DIR/" \( -name entropy_sweep.csv -o -name each_layer.csv -o -name each_layer.npy -o -name 'entropy_*.npy' \) -exec dirname {} \; | sort -u)
[ $drawn = 1 ] || fail "no results under $RESULTS_DIR: run scripts/eval_deebert.sh and scripts/entropy_eval.sh"
