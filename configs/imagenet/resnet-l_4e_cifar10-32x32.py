# The large anchor alone.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/resnet_l"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="resnet18", layers=(2, 2, 6, 2), channels=(48, 96, 192, 384)),
        ]
    )
)
