# The small anchor alone.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/resnet_s"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="resnet18", layers=(1, 1, 2, 1), channels=(24, 48, 96, 192)),
        ]
    )
)
