# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/stitched_resnet"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="resnet18",
                layers=(1, 1, 2, 1),
                channels=(24, 48, 96, 192),
                pretrained="work_dirs/cifar10/resnet_s/epoch_4.pth",
            ),
            dict(
                model="resnet18",
                layers=(2, 2, 6, 2),
                channels=(48, 96, 192, 384),
                pretrained="work_dirs/cifar10/resnet_l/epoch_4.pth",
            ),
        ],
        rank=8,
        flops_step=2e6,
    )
)
# The anchors and their heads go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the
# stitching layers' updates start from nothing, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1, head_lr_mult=0.1))
