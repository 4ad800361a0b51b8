#!/usr/bin/env bash
# Compares what COMMIT and the working tree compute, on this machine, bit for bit. Prints the first difference of each value.
#
#   tests/golden/compare.sh COMMIT [VALUES.json]     VALUES.json: keeps COMMIT's values there, and reads them if they exist
#
# PYTHONPATH names the tree that is run: the virtual environment is an editable install of one of them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
commit=$1 old=${2:-}
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'git -C "$root" worktree remove --force "$work/tree" 2>/dev/null; rm -rf "$work"' EXIT
old=${old:-$work/old.json}
if [ ! -s "$old" ]; then
  git -C "$root" worktree add --quiet --detach "$work/tree" "$commit"
  "$python" "$here/golden.py" collect --tree "$work/tree" --out "$old"
fi
"$python" "$here/golden.py" collect --tree "$root" --out "$work/new.json"
"$python" "$here/golden.py" compare "$old" "$work/new.json"
