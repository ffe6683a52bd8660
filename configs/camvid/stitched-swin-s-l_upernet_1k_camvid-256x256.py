# Both anchors stitched: every stitch is trained in this one run.
_base_ = "swin-l_upernet_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/stitched_swin"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=8,
                embed_dim=24,
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 4, 8),
                pretrained="work_dirs/camvid/swin_s/iter_1000.pth",
            ),
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=8,
                embed_dim=48,
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 8, 16),
                pretrained="work_dirs/camvid/swin_l/iter_1000.pth",
            ),
        ],
        rank=8,
        flops_step=60e6,
    ),
    # Whichever route runs, the heads see maps of the large anchor's widths: those of its own run fit.
    decode_head=dict(
        init_cfg=dict(type="Pretrained", prefix="decode_head.", checkpoint="work_dirs/camvid/swin_l/iter_1000.pth")
    ),
    auxiliary_head=dict(
        init_cfg=dict(type="Pretrained", prefix="auxiliary_head.", checkpoint="work_dirs/camvid/swin_l/iter_1000.pth")
    ),
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the heads, and the
# stitching layers' updates, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
