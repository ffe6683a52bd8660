# The small anchor alone.
_base_ = "vit-l_mask-rcnn_300_coco128-256x256.py"
work_dir = "work_dirs/coco128/anchor_s"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                embed_dim=64,
                depth=6,
                num_heads=2,
                window_size=8,
                global_blocks=(2, 5),
            )
        ],
    ),
    neck=dict(in_channels=64),
)
