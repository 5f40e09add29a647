#!/usr/bin/env bash
# Make .venv and install what the suite needs; quick where that is done already.
#   bash scripts/setup_env.sh [--dev] [--extras a,b]
# PYTHON in the environment names the Python to use (3.11 to 3.13), TORCH_INDEX a package index for torch.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if ! usable "$PYTHON"; then
            echo "error: PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that starts; correct it or unset it" >&2
            return 2
        fi
        echo "$PYTHON"
        return
    fi
    # The environment's own Python first: it is there even when the one that made it is not on the PATH.
    for candidate in "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11 python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found on the PATH; install one, or name it: PYTHON=/path/to/python3.12" >&2
    return 2
}

python="$(find_python)"
exec "$python" -I "$root/scripts/setup_env.py" "$@"
