#!/usr/bin/env bash
# The whole main job on a procedural set: data, two anchors, their stitching, every stitch evaluated, the Pareto front.
set -euo pipefail
cd "$(dirname "$0")/../.."
CONFIGS=configs/quickstart
WORK=work_dirs/quickstart

if [ ! -d $WORK/data ]; then
    python tools/dataset_converters/make_shapes.py $WORK/data --layout shapes --train 800 --val 64 --size 64 64
fi
python tools/train.py $CONFIGS/vit-s_setr_shapes-64x64.py
python tools/train.py $CONFIGS/vit-l_setr_shapes-64x64.py
python tools/train.py $CONFIGS/stitched-vit-s-l_setr_shapes-64x64.py
python tools/test.py $CONFIGS/stitched-vit-s-l_setr_shapes-64x64.py $WORK/stitched/iter_800.pth \
    --out $WORK/operating_points.json
python tools/analysis_tools/plot_pareto.py $WORK/operating_points.json --metric mIoU --out $WORK/pareto.png
