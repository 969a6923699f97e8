#!/usr/bin/env bash
# Installs what only frontier.py needs, and runs it; it says more. model2vec's own pins are older than this project's
# packages, with which it works, so its dependencies are not installed with it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_requirements
"$PYTHON" -c 'import model2vec.distill' 2> /dev/null ||
    "$PYTHON" -m pip install --quiet --no-deps model2vec==0.10.0 skeletoken==0.6.1 ||
    echo "note: model2vec could not be installed" >&2
export CUDA_VISIBLE_DEVICES=  # all on the CPU
"$PYTHON" -u "$ROOT/scripts/studies/frontier.py" "$@"
