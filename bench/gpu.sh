#!/usr/bin/env bash
# What only a card can show, in at most 9 minutes and without a network.
#   bash bench/gpu.sh [--only PART ...] [--output FILE]      on the machine with the card
#   bash bench/gpu.sh --dry                                  the same path on the processor, tiny models
#   bash bench/gpu.sh --pack                                 where bitsandbytes is installed: a copy with its one CUDA library
#                                                            (CUDA=130, or another) into .wheels/, which this script finds there
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = --pack ]; then
    from=$("$python" -c 'import importlib.util as u; print(u.find_spec("bitsandbytes").submodule_search_locations[0])')
    rm -rf .wheels && mkdir .wheels
    cp -r "$from" "$from"-*.dist-info .wheels/
    find .wheels -name __pycache__ -prune -exec rm -r {} +
    find .wheels -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name "*_cuda${CUDA:-130}.so" -delete
    du -sh .wheels
    exit
fi
[ -d .wheels ] && export PYTHONPATH="$PWD/.wheels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec timeout --kill-after=10 530 "$python" -m bench gpu --seconds 500 "$@"
