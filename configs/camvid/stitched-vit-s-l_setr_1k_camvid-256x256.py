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
# The anchors are pretrained; the heads and the stitching layers' updates start from nothing.
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(head_lr_mult=10.0, stitching_lr_mult=10.0),
)
