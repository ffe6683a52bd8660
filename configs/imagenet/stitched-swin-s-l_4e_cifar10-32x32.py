# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/stitched_swin"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                patch_size=2,
                window_size=4,
                embed_dim=24,
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 4, 8),
                pretrained="work_dirs/cifar10/swin_s/epoch_4.pth",
            ),
            dict(
                model="swin_tiny_patch4_window7_224",
                patch_size=2,
                window_size=4,
                embed_dim=48,
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 8, 16),
                pretrained="work_dirs/cifar10/swin_l/epoch_4.pth",
            ),
        ],
        rank=8,
        flops_step=5e6,
    )
)
# The anchors and their heads go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the
# stitching layers' updates start from nothing, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1, head_lr_mult=0.1))
