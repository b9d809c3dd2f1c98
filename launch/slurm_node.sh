#!/usr/bin/env bash
# One node's part of a SLURM job: torchrun, as launch/slurm_job.sh asks srun to start it on every node. A rank that fails is not restarted by torchrun, which would
# not look at what the run says of itself; the job's script starts all of them again, after the nodes were checked.
set -euo pipefail
exec >>"$NODE_LOGS/$SLURMD_NODENAME.log" 2>&1

# A static rendezvous: SLURM has said which nodes there are and in which order. With c10d the launcher of a node that is cut off would hang in its store, for as
# long as the kernel tries to send, instead of ending with its ranks.
exec python -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
    --rdzv-backend=static --rdzv-id="$RENDEZVOUS_ID" --master-addr="$RENDEZVOUS_HOST" --master-port="$RENDEZVOUS_PORT" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    launch/pretrain_moe.py "$@"
