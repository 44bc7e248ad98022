#!/usr/bin/env bash
# Makes .venv and installs exactly requirements.txt in it (and requirements-gpu.txt where a GPU is); takes a blink when
# nothing changed. Called by run_all.sh and run_tests.sh; run_pt.sh, run_sft.sh and run_dpo.sh use what it made.
# PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# slowly LABEL COMMAND...: runs a command that says nothing for minutes, with a line every ten seconds.
slowly() {
  local label=$1 start=$SECONDS code=0
  shift
  (while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "$label: $((SECONDS - start)) s so far"; done) &
  local lines=$!
  "$@" || code=$?
  kill "$lines" 2>/dev/null || true
  wait "$lines" 2>/dev/null || true
  return "$code"
}
pip_install() { PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pip_install_for_gpus() { pip_install --no-build-isolation -r requirements-gpu.txt >.venv/gpu.log 2>&1; }
trap 'echo "stopped by the user; run the same command to continue" >&2; exit 130' INT

python=${PYTHON:-python3}
stamp=.venv/installed
needed_gib=8 # a CUDA build of torch; a CPU build takes about 2

missing=()
command -v "$python" >/dev/null || missing+=("$python: not found; install Python 3.11 or 3.12, or set PYTHON=/path/to/python")
if command -v "$python" >/dev/null; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case $version in
    3.11 | 3.12) ;;
    *) missing+=("Python $version found, 3.11 or 3.12 expected; set PYTHON=/path/to/python") ;;
  esac
  "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("Python's venv module: not found; install it (Debian: apt-get install python3-venv)")
fi

requirements=(requirements.txt)
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then requirements+=(requirements-gpu.txt); fi
wanted=$({ echo "${version:-}"; cat "${requirements[@]}" pyproject.toml; } | sha256sum | cut -d' ' -f1)
if [ ${#missing[@]} -eq 0 ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi
free_gib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free_gib" -ge "$needed_gib" ] || missing+=("disk: $free_gib GiB free here, $needed_gib GiB expected; free some")

if [ ${#missing[@]} -gt 0 ]; then
  echo "error: setup cannot start:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  exit 2
fi

echo "installing requirements.txt into .venv (a few minutes the first time)"
rm -f "$stamp"
[ -x .venv/bin/python ] || "$python" -m venv .venv
if ! slowly "installing" pip_install -r requirements.txt; then
  echo "error: pip could not install requirements.txt (its messages stand above); mend that and run this again" >&2
  exit 2
fi
if [ ${#requirements[@]} -gt 1 ]; then
  echo "installing requirements-gpu.txt (flash-attn may be compiled: many minutes)"
  slowly "installing for GPUs" pip_install_for_gpus ||
    echo "note: not installed: requirements-gpu.txt (why: .venv/gpu.log). Configs that need flash-attn or liger-kernel are" \
      "refused until .venv/bin/pip install -r requirements-gpu.txt --no-build-isolation succeeds" >&2
fi
pip_install --no-deps --editable .
echo "$wanted" >"$stamp"
