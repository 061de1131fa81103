#!/usr/bin/env bash
# Set-up, ruff and the fast tests. --slow runs the slow ones as well; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-m "not slow")
needed=(requirements.txt data/requirements.txt tests/requirements.txt)
if [ "${1:-}" = --slow ]; then
    select=()
    needed+=(tests/slow-requirements.txt)
    shift
fi
. ./setup.sh "${needed[@]}"
ruff format --check
ruff check
python -m pytest -q -c tests/pytest.ini -n 2 --dist worksteal "${select[@]}" --durations=5 tests "$@"
