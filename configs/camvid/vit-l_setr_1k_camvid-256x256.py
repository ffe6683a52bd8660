# The large anchor alone.
_base_ = [
    "../_base_/models/setr_tiny.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/schedule_tiny_1k.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/camvid/anchor_l"
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(
        anchors=[dict(model="vit_tiny_patch16_224", embed_dim=192, depth=12, num_heads=6)],
        img_size=256,
    ),
    decode_head=dict(in_channels=192, channels=128, num_classes=11),
    auxiliary_head=dict(in_channels=192, channels=128, num_classes=11),
    test_cfg=dict(mode="slide", crop_size=(256, 256), stride=(224, 224)),
)
