#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SAMI pretraining on several nodes of a SLURM cluster: sbatch examples/pretrain_slurm.sh imagenet/train runs/sami_ti
# Given again after the time limit or a node failure it goes on from the last checkpoint.
#SBATCH --job-name=sami
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail
images=$1 run=$2

main_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
[[ -f $run/args.json ]] && resume=(--resume)

# 8 nodes x 8 GPUs x 64 images are the paper's batch of 4096; with fewer GPUs add --gradient-accumulation.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$main_node:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m efficientsam_hf.cli pretrain --recipe sami_ti --train-images "$images" --output-dir "$run" "${resume[@]}"
