#!/usr/bin/env bash
# The linter and the tests, in the active environment or in .venv, one process for each core. Further arguments go to
# pytest: a folder, -n 0 for a single process, --slow for the slow tests, too (they run where CI is set).
# In place of the tests: --fuzz 10000 for as many random cases of tests/fuzz, --faults 50 for as many kills,
# --mutants 400 for the faults in as many places of the code that the tests find (tests/mutants), --hf-suite for Hugging
# Face's own model tests on our classes and on theirs (tests/hf_suite; further arguments name test cases).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

if [ "${1:-}" = --mutants ]; then
    python_in_venv requirements.txt tests/requirements.txt tests/mutants/requirements.txt
    exec "$PYTHON" tests/mutants "${@:2}"
fi

python_in_venv requirements.txt tests/requirements.txt

if [ "${1:-}" = --hf-suite ]; then
    exec "$PYTHON" tests/hf_suite "${@:2}"
fi

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --dist worksteal --durations=10 "$@"
