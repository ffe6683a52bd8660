# The large anchor alone.
_base_ = [
    "../_base_/models/upernet_tiny.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/schedule_tiny_1k.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/camvid/swin_l"
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=8,
                embed_dim=48,
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 8, 16),
            ),
        ],
        img_size=256,
    ),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
