#!/usr/bin/env bash
# The whole main job on a procedural set: data, two anchors, their stitching, every stitch evaluated, the Pareto front.
# Writes to work_dirs/quickstart in the folder that it is run from.
set -euo pipefail
CONFIGS=$(dirname "$0")
TOOLS=$CONFIGS/../../tools
WORK=work_dirs/quickstart

if [ ! -d $WORK/data ]; then
    python "$TOOLS/dataset_converters/make_shapes.py" $WORK/data --layout shapes --train 800 --val 64 --size 64 64
fi
python "$TOOLS/train.py" "$CONFIGS/vit-s_setr_shapes-64x64.py"
python "$TOOLS/train.py" "$CONFIGS/vit-l_setr_shapes-64x64.py"
python "$TOOLS/train.py" "$CONFIGS/stitched-vit-s-l_setr_shapes-64x64.py"
python "$TOOLS/test.py" "$CONFIGS/stitched-vit-s-l_setr_shapes-64x64.py" $WORK/stitched/iter_800.pth \
    --out $WORK/operating_points.json
python "$TOOLS/analysis_tools/plot_pareto.py" $WORK/operating_points.json --out $WORK/pareto.png
