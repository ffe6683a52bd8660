# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_setr_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/stitched"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                embed_dim=96,
                depth=6,
                num_heads=3,
                pretrained="work_dirs/camvid/anchor_s/iter_1000.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                embed_dim=192,
                depth=12,
                num_heads=6,
                pretrained="work_dirs/camvid/anchor_l/iter_1000.pth",
            ),
        ],
        rank=8,
        flops_step=100e6,
    )
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the heads and the
# stitching layers' updates start from nothing, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
