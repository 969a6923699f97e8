#!/usr/bin/env bash
# Installs what only frontier.py needs, peers of early exit, and runs it; it says more. model2vec's own pins are older than
# this project's packages, with which it works, so its dependencies are not installed with it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_requirements

# peer MODULE ARGUMENTS: installs what the arguments of pip name, where the module is missing.
peer() {
    "$PYTHON" -c "import $1" 2> /dev/null || "$PYTHON" -m pip install --quiet "${@:2}" ||
        echo "note: $1 could not be installed" >&2
}
peer model2vec.distill --no-deps model2vec==0.10.0 skeletoken==0.6.1
peer setfit setfit==1.2.0
peer fasttext fasttext-numpy2-wheel==0.9.2
export CUDA_VISIBLE_DEVICES=  # all on the CPU
"$PYTHON" -u "$ROOT/scripts/studies/frontier.py" "$@"
