#!/usr/bin/env bash
# One setting with several seeds -> mean and standard deviation of every score and saving, in one table and one figure.
#   bash scripts/studies/seeds.sh --seeds 1 2 3 --highway_pooling mean
# Settings and further arguments: as for train_deebert.sh. What was interrupted goes on where it was.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
settings
export SETTINGS="" COMPARISON_DIR=${COMPARISON_DIR:-./seeds/$NAME}
exec bash "$(dirname "${BASH_SOURCE[0]}")/compare.sh" "$@"
