# Both anchors stitched: every stitch is trained in this one run.
_base_ = "swin-l_upernet_shapes-64x64.py"
work_dir = "work_dirs/quickstart/stitched_swin"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=4,
                embed_dim=24,
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 4, 8),
                pretrained="work_dirs/quickstart/swin_s/iter_800.pth",
            ),
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=4,
                embed_dim=48,
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 8, 16),
                pretrained="work_dirs/quickstart/swin_l/iter_800.pth",
            ),
        ],
        rank=8,
        flops_step=5e6,
    ),
    # Whichever route runs, the heads see maps of the large anchor's widths: those of its own run fit.
    decode_head=dict(
        init_cfg=dict(type="Pretrained", prefix="decode_head.", checkpoint="work_dirs/quickstart/swin_l/iter_800.pth")
    ),
    auxiliary_head=dict(
        init_cfg=dict(
            type="Pretrained", prefix="auxiliary_head.", checkpoint="work_dirs/quickstart/swin_l/iter_800.pth"
        )
    ),
)
# The anchors go on at a tenth of the rate that they were trained with, as SN-Net's authors advise; the heads, and the
# stitching layers' updates, at the full rate.
optim_wrapper = dict(paramwise_cfg=dict(anchor_lr_mult=0.1))
