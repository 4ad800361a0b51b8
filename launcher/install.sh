# Makes .venv at the clone's root and installs the project into it; sourced by quickstart.sh and tests/run.sh, or run:
#
#   bash launcher/install.sh [EXTRAS]      e.g. quickstart,onnx,retrieval (default: quickstart)
#
#   PYTHON              the interpreter to begin from (default: python3)
#   DISTILL_PIP_ARGS    further arguments for every pip install: another index, a local wheel folder
#
# A torch that this interpreter can already import and that is new enough (a cluster's module, a CUDA build) is used as it is.
# What was installed is remembered, so that the same call again takes a second.

# shellcheck shell=bash
oldest_torch=2.6

say() { echo "install: $*" >&2; }

check_system() {
  local python=$1
  command -v "$python" >/dev/null || { say "no $python here; Debian and Ubuntu: apt-get install python3 python3-venv"; return 2; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { say "$("$python" --version) is too old; Python 3.11 or newer is needed (PYTHON=python3.12 bash ...)"; return 2; }
  "$python" -c 'import venv, ensurepip' 2>/dev/null \
    || { say "$python cannot make virtual environments; Debian and Ubuntu: apt-get install python3-venv"; return 2; }
}

install() {
  local root=$1 extras=$2 python=${PYTHON:-python3}
  check_system "$python" || return
  local venv=$root/.venv constraints=$root/launcher/constraints.txt
  local stamp
  stamp=$(cat "$root/pyproject.toml" "$constraints" | cksum | cut -d' ' -f1)-$extras
  [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ] || return 0

  local own_torch
  own_torch=$("$python" - "$oldest_torch" 2>/dev/null <<'PY' || true
import sys
import torch
numbers = lambda version: [int(part) for part in version.split("+")[0].split(".")[:2]]
print(torch.__version__ if numbers(torch.__version__) >= numbers(sys.argv[1]) else "")
PY
)
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    [ ! -e "$venv" ] || say "$venv is incomplete: it is made again"
    "$python" -m venv --clear ${own_torch:+--system-site-packages} "$venv"
  fi
  local pip=("$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check)
  # shellcheck disable=SC2206  # words are meant to be split
  pip+=(${DISTILL_PIP_ARGS:-})
  if [ -n "$own_torch" ]; then
    say "using the torch $own_torch that is here"
    grep -v '^torch==' "$constraints" > "$venv/constraints.txt"
    echo "torch==$own_torch" >> "$venv/constraints.txt"
  else
    cp "$constraints" "$venv/constraints.txt"
    say "torch, then everything else, into $venv (a minute or two)"
    "${pip[@]}" -c "$venv/constraints.txt" torch
  fi
  # DeepSpeed's build imports torch, so it must see the environment's own
  "${pip[@]}" -c "$venv/constraints.txt" setuptools wheel ninja numpy py-cpuinfo packaging psutil
  DS_BUILD_OPS=0 "${pip[@]}" -c "$venv/constraints.txt" --no-build-isolation deepspeed
  "${pip[@]}" -c "$venv/constraints.txt" --no-build-isolation -e "${root}[$extras]"
  echo "$stamp" > "$venv/.installed"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  case " $* " in *" -h "* | *" --help "*) sed -n '/^#/!q;s/^# \{0,1\}//p' "$0"; exit ;; esac
  install "$(cd "$(dirname "$0")/.." && pwd)" "${1:-quickstart}"
fi
