#!/usr/bin/env bash
# Show the curves of the runs in a folder (default: runs) in a browser.
#   bash scripts/start_tensorboard.sh [RUNS] [TensorBoard options, e.g. --port 6007]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
runs="$root/runs"
case "${1:-}" in
    -h | --help)
        sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    "" | -*) ;;
    *)
        runs="$1"
        shift
        ;;
esac
if [ ! -d "$runs" ]; then
    echo "error: $runs is not a folder; train first (bash scripts/start_training.sh) or name the folder of your runs" >&2
    exit 2
fi
bash "$root/scripts/setup_env.sh"
exec "$root/.venv/bin/python" -m tensorboard.main --logdir "$runs" "$@"
