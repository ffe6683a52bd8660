# The small anchor alone.
_base_ = "swin-l_upernet_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/swin_s"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=8,
                embed_dim=24,
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 4, 8),
            ),
        ]
    ),
    decode_head=dict(in_channels=[24, 48, 96, 192]),
    auxiliary_head=dict(in_channels=96),
)
