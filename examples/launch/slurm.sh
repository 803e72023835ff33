#!/usr/bin/env bash
#SBATCH --job-name=latent-moe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One process runs on each GPU. JAX reads the coordinator and the indices from the variables of SLURM.
set -euo pipefail
srun .venv/bin/python -m examples.train --preset gpu --mesh fsdp=2,expert=8 --batch-size 32 \
  --run "${RUN:-runs/slurm}" --coordinator auto "$@"
