# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_setr_shapes-64x64.py"
work_dir = "work_dirs/quickstart/stitched"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=32,
                depth=6,
                num_heads=2,
                pretrained="work_dirs/quickstart/anchor_s/iter_800.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=128,
                depth=12,
                num_heads=4,
                pretrained="work_dirs/quickstart/anchor_l/iter_800.pth",
            ),
        ],
        rank=8,
        flops_step=20e6,
    )
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the
# stitching layers' updates and the heads, which run.sh takes from the large anchor's run, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
