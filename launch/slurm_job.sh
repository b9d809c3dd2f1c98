# What the SLURM scripts of this folder do; they source this file and call `run_job "$@"`.
#
# A job is a row of starts. Before each the nodes are checked, and a bad one is left out for a spare; then one torchrun runs on every node, and when it has ended,
# run_status.json tells what follows: the end, another start here and now, or the queue again. tools/slurm_job.py decides that; this file only does it.
#
# A script that sources this may set
#   srun_options   options for every srun
#   inside         words before every command, e.g. those that enter a container
#   on_this_node   words before a command that runs on the batch script's own node
# shellcheck shell=bash
set -euo pipefail

srun_options=()
inside=()
on_this_node=()

fail() {
    echo "error: $*" >&2
    exit 2
}

# decide COMMAND ...: a question to tools/slurm_job.py, answered on stdout.
decide() {
    "${on_this_node[@]}" python tools/slurm_job.py "$@" "${words[@]}"
}

# on_nodes NODE,NODE command ...: the command once on each of these nodes; a node whose command has ended does not take the others with it.
on_nodes() {
    local names=$1 count
    count=$(tr ',' '\n' <<<"$names" | wc -l)
    shift
    # --ntasks too: the job's own number of tasks, spare nodes among them, would be taken otherwise.
    srun --nodelist="$names" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 "${srun_options[@]}" "$@"
}

# The address SLURM itself reaches a node at.
address_of() {
    scontrol show node "$1" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2
}

job_field() {
    scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2
}

# Seconds until the job's time limit; a large number without one.
seconds_left() {
    local end
    end=$(job_field EndTime)
    if [[ $end == Unknown ]]; then echo 1000000000; else echo $(($(date -d "$end" +%s) - $(date +%s))); fi
}

# The warning ahead of the time limit comes once, up to a minute early; ranks that start after it would be killed unsaved.
allocation_ends() {
    ((${#told_to_stop[@]})) || (($(seconds_left) <= grace_seconds + 60))
}

to_the_queue() {
    echo "putting job $SLURM_JOB_ID back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0 # where SLURM has not ended this script yet
}

# preflight_on NODE,NODE COMMAND ...: a command of tools/preflight.py on these nodes; srun ends what hangs.
preflight_on() {
    local names=$1
    shift
    on_nodes "$names" --wait="$preflight_seconds" --time="$((preflight_seconds / 60 + 2))" --output="$out/%N.log" --open-mode=append \
        "${inside[@]}" python tools/preflight.py "$@" --out "$out" "${words[@]}" </dev/null
}

# Sets `chosen`, the nodes to train on; 1 when too few are good.
choose_nodes() {
    local out=$1 name group answer
    if [[ $preflight != True ]]; then
        chosen=$(head -n "$num_nodes" <<<"$all_nodes" | paste -s -d,)
        return 0
    fi
    mkdir -p "$out"
    preflight_on "$(paste -s -d, <<<"$all_nodes")" node || echo "preflight: not every node answered"
    for name in $all_nodes; do # one that is down can keep srun from starting anywhere, so the silent ones are asked one by one
        if [[ ! -f $out/node/$name.json ]]; then preflight_on "$name" node & fi
    done
    wait
    local port=$((base_port + 1))
    while :; do
        answer=$("${on_this_node[@]}" python tools/preflight.py next --out "$out" --nodes "$(paste -s -d, <<<"$all_nodes")" --want "$num_nodes" "${words[@]}") || return 1
        if [[ $answer == use\ * ]]; then
            chosen=${answer#use }
            return 0
        fi
        while read -r _ name group; do # groups of one answer share no node, so they run at the same time
            preflight_on "$group" reduce --round "$name" --nodes "$group" --meet "$(address_of "${group%%,*}"):$port" ||
                echo "preflight: $name did not end in order on $group" &
            port=$((port + 1))
        done <<<"$answer"
        wait
        if ((${#told_to_stop[@]})); then return 1; fi # a signal ends `wait` at once
    done
}

# One torchrun on every chosen node.
train() {
    local first=${chosen%%,*}
    export RENDEZVOUS_HOST RENDEZVOUS_PORT=$base_port RENDEZVOUS_ID=$SLURM_JOB_ID.$start RANKS_PER_NODE=$ranks_per_node NODE_LOGS=$logs
    RENDEZVOUS_HOST=$(address_of "$first")
    echo "job $SLURM_JOB_ID, start $start on $chosen, $ranks_per_node ranks each, rendezvous $RENDEZVOUS_HOST:$base_port, run $run_dir, logs $logs/NODE.log"
    # --wait: where one node has ended, the others may still be writing the last file of a checkpoint.
    on_nodes "$chosen" --wait="$grace_seconds" "${inside[@]}" launch/slurm_node.sh "${words[@]}"
}

run_job() {
    [[ $# -ge 1 ]] || fail "no config; sbatch launch/pretrain_moe.sbatch configs/X.yaml [more.yaml ...] [section.field=value ...]"
    words=()
    local word
    for word in "$@"; do
        if [[ $word == *=* ]]; then words+=("$word"); else words+=(--config "$word"); fi
    done
    all_nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")

    # A wrong setting is found here, in a second, not by every rank after minutes. What the words are is said in tools/slurm_job.py.
    local assignments run_dir num_nodes ranks_per_node grace_seconds preflight preflight_seconds
    assignments=$(decide settings --num-nodes "$(wc -l <<<"$all_nodes")") || exit $?
    eval "$assignments"

    logs=$run_dir/slurm/$SLURM_JOB_ID
    mkdir -p "$logs"
    base_port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID * 50 % 20000))}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace_seconds - 30)) # seconds a signalled rank has to save before torchrun kills it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-1} + ranks_per_node - 1) / ranks_per_node))}

    # The batch script itself outlives a signal, to decide what comes next (a handler, not '': what is ignored here would be ignored in every rank).
    local told_to_stop=()
    trap 'told_to_stop=(--told-to-stop)' TERM USR2

    local start status chosen answer
    while :; do
        start=$(decide begin --logs "$logs") || exit $?
        status=0
        choose_nodes "$logs/preflight_$start" || status=1
        if allocation_ends; then to_the_queue; fi # what the preflight says then, it says of processes that were told to stop
        ((status == 0)) || exit 1
        train || status=$?
        answer=$(decide next --logs "$logs" --job-state "$(job_field JobState)" "${told_to_stop[@]}") || exit $?
        echo "job $SLURM_JOB_ID, start $start: srun ended with $status; what follows: $answer"
        case $answer in
            again) ;;
            requeue) to_the_queue ;;
            end\ *) exit "${answer#end }" ;;
            *) fail "tools/slurm_job.py answered '$answer'" ;;
        esac
    done
}
