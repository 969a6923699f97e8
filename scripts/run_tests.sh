#!/usr/bin/env bash
# The linter and the tests, in the active environment or in .venv. Further arguments go to pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
python_in_venv requirements.txt tests/requirements.txt

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest tests "$@"
