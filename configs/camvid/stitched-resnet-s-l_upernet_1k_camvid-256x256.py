# Both anchors stitched: every stitch is trained in this one run.
_base_ = "resnet-l_upernet_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/stitched_resnet"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="resnet18",
                layers=(1, 1, 2, 1),
                channels=(16, 32, 64, 128),
                pretrained="work_dirs/camvid/resnet_s/iter_1000.pth",
            ),
            dict(
                model="resnet18",
                layers=(2, 2, 6, 2),
                channels=(32, 64, 128, 256),
                pretrained="work_dirs/camvid/resnet_l/iter_1000.pth",
            ),
        ],
        rank=8,
        flops_step=60e6,
    ),
    # Whichever route runs, the heads see maps of the large anchor's widths: those of its own run fit.
    decode_head=dict(
        init_cfg=dict(type="Pretrained", prefix="decode_head.", checkpoint="work_dirs/camvid/resnet_l/iter_1000.pth")
    ),
    auxiliary_head=dict(
        init_cfg=dict(type="Pretrained", prefix="auxiliary_head.", checkpoint="work_dirs/camvid/resnet_l/iter_1000.pth")
    ),
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the heads, and the
# stitching layers' updates, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
