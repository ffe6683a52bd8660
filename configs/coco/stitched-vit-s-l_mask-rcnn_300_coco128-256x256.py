# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_mask-rcnn_300_coco128-256x256.py"
work_dir = "work_dirs/coco128/stitched"
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
                pretrained="work_dirs/coco128/anchor_s/iter_300.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                embed_dim=128,
                depth=12,
                num_heads=4,
                window_size=8,
                global_blocks=(2, 5, 8, 11),
                pretrained="work_dirs/coco128/anchor_l/iter_300.pth",
            ),
        ],
        rank=8,
        flops_step=50e6,
    )
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the heads and the
# stitching layers' updates start from nothing, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
