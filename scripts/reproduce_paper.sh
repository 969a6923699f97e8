#!/usr/bin/env bash
# The paper's experiments by one command: trains, scores and times each model on each task, and ends with its Table 1,
# the paper's own numbers beside ours, and its figures 2 to 6. Run again, it resumes what was interrupted.
#   TASKS="SST-2 MRPC" MODELS="bert-base-uncased ./my_model" bash scripts/reproduce_paper.sh
# Further arguments go to run_glue_deebert.py in every run.
set -euo pipefail

PATH_TO_DATA=${PATH_TO_DATA:-./glue_data}  # holds a folder for each task; what is missing is fetched from the hub
REPRODUCTION_DIR=${REPRODUCTION_DIR:-./reproduction}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_requirements

# shellcheck disable=SC2086  # one argument for each task and model
"$PYTHON" -u "$ROOT/scripts/paper/reproduce_paper.py" ${TASKS:+--tasks $TASKS} ${MODELS:+--models $MODELS} \
    --data_dir "$PATH_TO_DATA" --output_dir "$REPRODUCTION_DIR" --epochs "${EPOCHS:-$(paper_epochs bert)}" \
    --roberta_epochs "${EPOCHS:-$(paper_epochs roberta)}" --max_seq_length 128 "${PAPER_RECIPE[@]}" "$@"
