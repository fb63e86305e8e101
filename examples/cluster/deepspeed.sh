#!/usr/bin/env bash
# Start on the machines of `hostfile`, from one of them, by ssh (pdsh): examples/cluster/deepspeed.sh
# It goes on with the run in --save if there is one, and starts again by itself at most 20 times.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/cluster

# Each machine needs this checkout, its .venv and the data under the same paths, and ssh to every one without a password.
# DeepSpeed sends its own PYTHON*, NCCL* and the values of this file to the other machines, nothing else.
export DS_ENV_FILE="$here/.deepspeed_env"
launch=(.venv/bin/deepspeed --hostfile "$here/hostfile" --master_port 29500)

train=(
  --preset gpt2-large --tp 4 --pp 2 --precision bf16
  --micro-batch-size 4 --global-batch-size 512 --train-steps 100000 --warmup-steps 2000 --lr 2.5e-4
  --data-path data/corpus_text_document
  --save runs/gpt2-large --save-interval 500 --auto-resume --async-save
)

"${launch[@]}" tools/preflight.py "${train[@]}"
"$here/supervise.sh" 20 "${launch[@]}" examples/pretrain_gpt.py "${train[@]}"
