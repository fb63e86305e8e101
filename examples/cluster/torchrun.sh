#!/usr/bin/env bash
# Start on this machine; run it on every one of them (in any order): examples/cluster/torchrun.sh FIRST_HOST HOSTS
#   FIRST_HOST  name or address of one of the machines, which hosts the rendezvous    HOSTS  how many there are
# torchrun is the supervisor: when a rank fails, on any machine, all are started again, at most --max-restarts times.
# It cannot tell exit codes apart: it also starts again after a wrong flag (2), which then fails again.
set -euo pipefail
cd "$(dirname "$0")/../.."
first_host=$1
hosts=$2
# shellcheck source=env.sh
source examples/cluster/env.sh

launch=(
  .venv/bin/torchrun --nnodes "$hosts" --nproc-per-node 8
  --rdzv-backend c10d --rdzv-endpoint "$first_host:29500" --rdzv-id gpt2-large
)

train=(
  --preset gpt2-large --tp 4 --pp 2 --precision bf16
  --micro-batch-size 4 --global-batch-size 512 --train-steps 100000 --warmup-steps 2000 --lr 2.5e-4
  --data-path data/corpus_text_document
  --save runs/gpt2-large --save-interval 500 --auto-resume --async-save
)

"${launch[@]}" tools/preflight.py "${train[@]}"
# Ctrl-C and SIGTERM go to the ranks, which then save: 120 s instead of 30 until torchrun kills them.
"${launch[@]}" --max-restarts 20 --shutdown-timeout 120 examples/pretrain_gpt.py "${train[@]}"
