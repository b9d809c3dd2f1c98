#!/usr/bin/env bash
# One node's part of a SLURM job: torchrun, as launch/slurm_job.sh asks srun to start it on every node. A rank that fails is not restarted by torchrun, which would
# not look at what the run says of itself; the job's script starts all of them again, after the nodes were checked.
set -euo pipefail
exec >>"$NODE_LOGS/$SLURMD_NODENAME.log" 2>&1

# The step's first node keeps the rendezvous; torchrun would find out by comparing names, which need not be those SLURM uses.
is_host=0
if [[ $SLURM_NODEID == 0 ]]; then is_host=1; fi

exec python -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$RENDEZVOUS_ID" --rdzv-endpoint="$RENDEZVOUS_HOST:$RENDEZVOUS_PORT" --rdzv-conf="join_timeout=600,is_host=$is_host" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    launch/pretrain_moe.py "$@"
