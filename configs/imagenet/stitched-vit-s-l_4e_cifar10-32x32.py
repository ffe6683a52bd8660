# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/stitched"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                patch_size=4,
                embed_dim=64,
                depth=6,
                num_heads=2,
                pretrained="work_dirs/cifar10/anchor_s/epoch_4.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=4,
                embed_dim=96,
                depth=12,
                num_heads=3,
                pretrained="work_dirs/cifar10/anchor_l/epoch_4.pth",
            ),
        ],
        rank=8,
        flops_step=6e6,
    )
)
# The anchors and their heads go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the
# stitching layers' updates start from nothing, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1, head_lr_mult=0.1))
