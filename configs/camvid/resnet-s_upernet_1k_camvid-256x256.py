# The small anchor alone.
_base_ = "resnet-l_upernet_1k_camvid-256x256.py"
work_dir = "work_dirs/camvid/resnet_s"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="resnet18", layers=(1, 1, 2, 1), channels=(16, 32, 64, 128)),
        ]
    ),
    decode_head=dict(in_channels=[16, 32, 64, 128]),
    auxiliary_head=dict(in_channels=64),
)
