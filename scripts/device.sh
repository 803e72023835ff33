#!/usr/bin/env bash
# Prints the extra that fits this machine: cpu, cuda12 or cuda13. LATENT_MOE_DEVICE=NAME overrides it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${LATENT_MOE_DEVICE:-} in
cpu | cuda12 | cuda13)
  echo "$LATENT_MOE_DEVICE"
  exit
  ;;
"") ;;
*) die "LATENT_MOE_DEVICE='$LATENT_MOE_DEVICE' is unknown: use cpu, cuda12 or cuda13, or leave it unset." ;;
esac

# CUDA 13 needs driver 580 and dropped GPUs older than Turing (compute capability 7.5); CUDA 12 needs driver 525.
gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || true
if [[ $(uname -s) == Linux && $gpu =~ ^([0-9]+)[0-9.]*,\ *([0-9]+)\.([0-9]+) ]]; then
  driver=${BASH_REMATCH[1]} capability=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
  if ((driver >= 580 && capability >= 75)); then
    echo cuda13
    exit
  elif ((driver >= 525)); then
    echo cuda12
    exit
  fi
fi
echo cpu
