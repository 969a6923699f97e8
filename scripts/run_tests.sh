#!/usr/bin/env bash
# The linter and the tests, in the active environment or in .venv, one process for each core. Further arguments go to
# pytest: a folder, -n 0 for a single process, --slow for the slow tests, too (they run where CI is set).
# In place of the tests: --fuzz 10000 for as many random cases of tests/fuzz, --faults 50 for as many kills,
# --mutants for small faults in the code, one at a time, which the tests have to notice (tests/mutants; further arguments
# name mutants, such as 'deebert.training.*'), --hf-suite for Hugging Face's own model tests on our classes and on theirs
# (tests/hf_suite; further arguments name test cases; one of them runs where CI is set).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

if [ "${1:-}" = --mutants ]; then
    python_in_venv requirements.txt tests/requirements.txt tests/mutants/requirements.txt
    mkdir -p mutation && cd mutation  # results stay there: a run that was stopped goes on
    rm -rf deebert scripts tests docs
    cp -rp ../{deebert,scripts,tests,docs,README.md,run_glue_deebert.py,setup.py,requirements.txt,.pytest.ini} .
    cp -p tests/mutants/setup.cfg .
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
    exec "$PYTHON" -m mutmut run "${@:2}"
fi

python_in_venv requirements.txt tests/requirements.txt

if [ "${1:-}" = --hf-suite ]; then
    exec "$PYTHON" tests/hf_suite "${@:2}"
fi

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --dist worksteal --durations=10 "$@"
if [ -n "${CI:-}" ] && [ $# = 0 ]; then
    "$PYTHON" tests/hf_suite bert_exits
fi
