#!/usr/bin/env bash
# Made-up scenes -> VAE -> latents -> teacher -> one-step student -> table and pictures.
# Usage: scripts/occfm_demo.sh [FOLDER] [SCENES VAE_UPDATES TEACHER_UPDATES STUDENT_UPDATES]
set -euo pipefail

OUT=${1:-runs/occfm-demo}
SCENES=${2:-48} VAE_UPDATES=${3:-800} TEACHER_UPDATES=${4:-900} STUDENT_UPDATES=${5:-80}
MFD_FAST=${MFD_FAST:-.venv/bin/mfd-fast}

# 40 x 40 x 4 voxels, the grid of the model "tiny"
"$MFD_FAST" prepare occfm --data "$OUT/data" --out "$OUT/labels" \
  --synthetic "$SCENES" --grid 40,40,4 --voxel 1.0
"$MFD_FAST" pretrain occfm-vae --store "$OUT/labels" --out "$OUT/vae" \
  --updates "$VAE_UPDATES" --batch-size 6 --lr 3e-3 --warmup-updates 20
"$MFD_FAST" prepare occfm --data "$OUT/data" --out "$OUT/latents" --vae "$OUT/vae/vae.safetensors"
"$MFD_FAST" pretrain occfm --store "$OUT/latents" --out "$OUT/teacher" \
  --updates "$TEACHER_UPDATES" --batch-size 8 --lr 2e-3 --warmup-updates 30 --ema-decay 0.97
"$MFD_FAST" distill occfm-tiny --out "$OUT/student" \
  --teacher "$OUT/teacher/teacher.safetensors" \
  --occfm.store "$OUT/latents" --occfm.vae "$OUT/vae/vae.safetensors" \
  --train.updates "$STUDENT_UPDATES" --train.batch-size 4 --num-eval-samples 64 \
  --distill.aux-updates 4 --distill.step-size 0.15 --distill.ema-decay 0.9 \
  --distill.student-optim.lr 2e-4 --distill.student-optim.warmup-updates 5 \
  --distill.aux-optim.lr 5e-4 --distill.aux-optim.warmup-updates 5
