#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a GPU is for a few minutes good for: checks and benchmarks (4 minutes), then training (8 minutes).
#   bash benchmarks/on_gpu.sh PHOTO [PHOTOS] [OUT]
# PHOTO is any picture; PHOTOS the folder of docs/photos.md, without which nothing is trained (its train splits fit into
# 40 MiB after `python benchmarks/pack_photos.py`); OUT takes the logs, and the trained model in pieces of 12 MB.
set -uo pipefail
if [ ! -f "${1:-}" ] || [ -n "${2:-}" ] && [ ! -d "${2:-}" ]; then
    echo "usage: on_gpu.sh PHOTO [PHOTOS] [OUT]: a picture, and a folder, got '${1:-}' and '${2:-}'" >&2
    exit 2
fi
photo=$(realpath "$1") photos=${2:+$(realpath "$2")} out=$(realpath -m "${3:-runs/on_gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1

timed() { # name, seconds, command: its output also in OUT/name.log; a failure does not end the others
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    echo "== $name ended with ${PIPESTATUS[0]} after $((SECONDS - started)) s"
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
timed agreement 60 python3 benchmarks/gpu_agreement.py "$photo"
timed everything 90 python3 benchmarks/segment_everything.py --device cuda --image "$photo" \
    --rows encoder prompts everything --repeats 3
timed train_step 60 python3 benchmarks/train_step.py --device cuda --image-size 512 --batch-size 32 --limits
timed train_step_256 40 python3 benchmarks/train_step.py --device cuda --batch-size 128 --limits

if [ -n "$photos" ]; then
    run=$out/run
    (cd "$(dirname "$photos")" && timed training 600 python3 -m efficientsam_hf.cli finetune --recipe photos_gpu \
        --output-dir "$run")
    python3 - "$run/model" "$out/model" << 'PYTHON'
import sys
from efficientsam_hf import EfficientSamModel, EfficientSamProcessor
EfficientSamModel.from_pretrained(sys.argv[1]).half().save_pretrained(sys.argv[2], max_shard_size="12MB")
EfficientSamProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
PYTHON
    cp "$run/log.jsonl" "$out/log.jsonl"
fi
