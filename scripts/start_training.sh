#!/usr/bin/env bash
# From nothing to a trained, measured tagger: environment, demo data, training, evaluation, three tagged images.
#   bash scripts/start_training.sh [--config FILE] [--resume latest|best|auto|none|PATH] [--validate-only] [section.key=value ...]
# Without --config it trains configs/demo.yaml. Works from any folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
case "${1:-}" in
    -h | --help)
        sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
bash "$root/scripts/setup_env.sh"
export TAGSMITH_CALLED_FROM="$PWD"
# Threads that wait give their core back; spinning, they slow training several times beside any other busy process.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
cd "$root"
exec .venv/bin/python -m scripts.start_training "$@"
