#!/usr/bin/env bash
# Make .venv with what development needs and run the tests.
#   bash scripts/run_tests.sh                 all but the slow tier, on every core
#   bash scripts/run_tests.sh PYTEST_ARGS...  whatever they say, e.g. -m slow or tests/unit/test_demo_dataset.py
set -euo pipefail
case "${1:-}" in
    -h | --help)
        sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/setup_env.sh" --dev
cd "$root"
# One thread each: the workers are the parallelism, and sums come out the same on any number of cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Threads that wait give their core back instead of spinning on it.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ "$#" -eq 0 ]; then
    set -- -q -n auto -m "not slow"
fi
exec .venv/bin/python -m pytest "$@"
