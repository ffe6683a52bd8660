# The large anchor alone.
_base_ = [
    "../_base_/models/upernet_tiny.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/schedule_tiny_1k.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/camvid/resnet_l"
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(
        anchors=[
            dict(model="resnet18", layers=(2, 2, 6, 2), channels=(32, 64, 128, 256)),
        ],
        img_size=256,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], num_classes=11),
    auxiliary_head=dict(in_channels=128, num_classes=11),
)
