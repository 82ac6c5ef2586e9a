#!/usr/bin/env bash
# Makes the demo's assets from nothing: text, tokenizer, and a small decoder pretrained on 256 tokens by longlora itself.
#     demo/pretrain.sh CACHE     (about a quarter of an hour on two cores; run again, it goes on where it was stopped)
# Then demo/make_assets.py CACHE puts what ships into longlora/assets.
set -euo pipefail
here=$(dirname "$0")
cache=$1
mkdir -p "$cache/start"
[ -d "$cache/held_out" ] || python "$here/get_text.py" "$cache"
[ -f "$cache/start/tokenizer.json" ] || python "$here/make_tokenizer.py" "$cache/train" "$cache/start"
cp "$here/config.json" "$cache/start/"
resume=()
[ -d "$cache/model" ] && resume=(--resume-from-checkpoint latest)
python -m longlora train --init "$cache/start" --full --data "$cache/train" \
    --output-dir "$cache/model" --cache-dir "$cache/tokens" --attention dense --sequence-length 256 \
    --per-device-train-batch-size 16 --max-steps 2000 --learning-rate 6e-3 --lr-scheduler-type cosine --warmup-steps 100 \
    --weight-decay 0.1 --logging-steps 20 --save-steps 250 --save-total-limit 2 --seed 1 "${resume[@]}"
