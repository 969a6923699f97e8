#!/usr/bin/env bash
# Installs what only frontier.py needs, peers of early exit, and runs it; it says more. model2vec's own pins are older than
# this project's packages, with which it works, so its dependencies are not installed with it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_requirements
"$PYTHON" -c 'import model2vec.distill' 2> /dev/null ||
    "$PYTHON" -m pip install --quiet --no-deps model2vec==0.10.0 skeletoken==0.6.1 ||
    echo "note: model2vec could not be installed" >&2
for peer in setfit==1.2.0 fasttext-numpy2-wheel==0.9.2; do
    "$PYTHON" -c "import $(echo $peer | cut -d= -f1 | cut -d- -f1)" 2> /dev/null ||
        "$PYTHON" -m pip install --quiet $peer || echo "note: $peer could not be installed" >&2
done
export CUDA_VISIBLE_DEVICES=  # all on the CPU
"$PYTHON" -u "$ROOT/scripts/studies/frontier.py" "$@"
