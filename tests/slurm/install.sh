#!/usr/bin/env bash
# Installs what tests/slurm and tests/hosts need, where that can be done: root, and Debian's packages. Never fails: without them these tests are skipped, and say so.
# No service is configured; the tests start daemons of their own, on their own ports.
packages=(slurmctld slurmd slurm-client munge iproute2)
limit=120 # seconds for each call of apt-get

loudly() {
    printf '%s\n' "==================================================================================" \
        "NOT INSTALLED: ${packages[*]}" "         $1" "         The SLURM and two-host tests will be skipped." \
        "=================================================================================="
    exit 0
}

install() {
    DEBIAN_FRONTEND=noninteractive timeout "$limit" apt-get install -y --no-install-recommends "${packages[@]}" 2>&1
}

PATH=$PATH:/usr/sbin:/sbin
if [[ $(command -v slurmctld slurmd sbatch munged ip | wc -l) == 5 ]]; then
    echo "== SLURM and iproute2 are installed: $(slurmctld -V)"
    exit 0
fi
[[ $(id -u) == 0 ]] || loudly "This is not root."
command -v apt-get >/dev/null || loudly "There is no apt-get."
if ! output=$(install); then
    timeout "$limit" apt-get update >/dev/null 2>&1 # a fresh image has no lists
    output=$(install) || loudly "apt-get said: $(tail -n 1 <<<"$output")"
fi
echo "== installed ${packages[*]}: $(slurmctld -V)"
