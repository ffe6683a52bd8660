#!/usr/bin/env bash
# The whole main job on a procedural set: data, two anchors, their stitching, every stitch evaluated, the Pareto front.
# Writes to work_dirs/quickstart in the folder that it is run from. The console has progress; logs are beside the results.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
# As short as a user would type them.
CONFIGS=$ROOT/configs/quickstart; CONFIGS=${CONFIGS#"$PWD"/}
TOOLS=$ROOT/tools; TOOLS=${TOOLS#"$PWD"/}
PYTHON=$(command -v python); PYTHON=${PYTHON#"$PWD"/}
WORK=work_dirs/quickstart
CONFIG=$CONFIGS/stitched-vit-s-l_setr_shapes-64x64.py
CHECKPOINT=$WORK/stitched/iter_800.pth
POINTS=$WORK/operating_points.json
MODEL=$WORK/stitched-vit-s-l
# Whichever route runs, the heads see maps of the large anchor's width: those of its own run fit.
HEADS=()
for head in decode_head auxiliary_head; do
    HEADS+=(model.$head.init_cfg.type=Pretrained model.$head.init_cfg.prefix=$head.
        model.$head.init_cfg.checkpoint=$WORK/anchor_l/iter_800.pth)
done

echo "Two small vision transformers become one backbone with 32 speed-quality trade-offs."
echo "This takes about 7 minutes on two idle CPU cores and needs no GPU. Results go to $WORK/."

echo "1/7  Data: procedural scenes, each pixel of which is to be labelled with one of 8 classes"
if [ ! -d $WORK/data ]; then
    python "$TOOLS/dataset_converters/make_shapes.py" $WORK/data --layout shapes --train 2400 --val 200 --size 64 64
else
    echo "     $WORK/data is there already"
fi
echo "2/7  The small anchor, trained alone: it stands for a pretrained model"
python "$TOOLS/train.py" "$CONFIGS/vit-s_setr_shapes-64x64.py" --quiet
echo "3/7  The large anchor, trained alone"
python "$TOOLS/train.py" "$CONFIGS/vit-l_setr_shapes-64x64.py" --quiet
echo "4/7  Both anchors, stitched: each iteration trains one of the 32 routes through them"
python "$TOOLS/train.py" "$CONFIG" --quiet --cfg-options "${HEADS[@]}"
echo "5/7  Every route, evaluated on the validation images"
python "$TOOLS/test.py" "$CONFIG" $CHECKPOINT --out $POINTS --quiet
echo "6/7  The Pareto front, as a picture"
python "$TOOLS/analysis_tools/plot_pareto.py" $POINTS --out $WORK/pareto.png
echo "7/7  The model and its front as a folder to publish"
rm -rf $MODEL  # of an earlier run
python "$TOOLS/misc/publish_model.py" "$CONFIG" $CHECKPOINT $MODEL --points $POINTS >/dev/null

DEMO="make demo"
[ "$PWD" = "$ROOT" ] || DEMO="$PYTHON -m mmsnnet.demo $MODEL --points $POINTS --examples $WORK/data/images/validation"
cat <<END

Done. In $WORK/:
  pareto.png                          quality over cost of every route
  operating_points.json               the same as data
  stitched/iter_800.pth               the weights of all routes
  stitched-vit-s-l/                   the same to publish: weights, config and front
  anchor_s/, anchor_l/, stitched/     logs: <time>/<time>.log, with config and environment

Next, for example:
  $DEMO
  $PYTHON $TOOLS/analysis_tools/benchmark.py $CONFIG --checkpoint $CHECKPOINT --out $POINTS
  $PYTHON $TOOLS/analysis_tools/select_stitch.py $POINTS --max-latency-ms 4
  $PYTHON $TOOLS/deployment/extract_stitch.py $CONFIG $CHECKPOINT S2-L6 --out small_model
  $PYTHON $TOOLS/serve.py $MODEL --deadline-ms 100
END
