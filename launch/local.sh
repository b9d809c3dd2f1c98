#!/usr/bin/env bash
# Training on this machine, one process per GPU (or 2 processes on a CPU):
#
#     launch/local.sh configs/X.yaml [more.yaml ...] [section.field=value ...] [--dry-run]
#     NPROC=4 launch/local.sh configs/X.yaml
#
# The same as the torchrun line it prints. Ctrl-C or `kill -USR2` saves and stops; the same command goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
if [[ -x .venv/bin/torchrun ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi
command -v torchrun >/dev/null || { echo "error: no torchrun here; run 'make env' first" >&2; exit 2; }

words=()
for word in "$@"; do
    if [[ $word == *.yaml || $word == *.yml ]] && [[ $word != *=* ]]; then words+=(--config "$word"); else words+=("$word"); fi
done

if [[ -z ${NPROC:-} ]]; then
    NPROC=2
    if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') && [[ $gpus -gt 0 ]]; then NPROC=$gpus; fi
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + NPROC - 1) / NPROC))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300} # seconds a signalled rank has to save

# A wrong setting is said here, once and at once, without what torchrun has to say about ranks that failed.
plan=$(python launch/pretrain_moe.py "${words[@]}" --dry-run --world-size "$NPROC") || exit $?
if [[ " ${words[*]} " == *" --dry-run "* ]]; then
    echo "$plan"
    exit 0
fi

set -x
exec torchrun --standalone --nproc-per-node "$NPROC" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 launch/pretrain_moe.py "${words[@]}"
