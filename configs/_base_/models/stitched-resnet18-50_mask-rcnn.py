# ResNet-18 and -50 with FPN and Mask R-CNN, as in mmdetection's ResNet configs.
_base_ = "stitched-swin-ti-s_mask-rcnn.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="resnet18.a1_in1k", pretrained=True),
            dict(model="resnet50.a1_in1k", pretrained=True),
        ],
        norm_taps=False,
        flops_step=4e9,
        frozen_stages=1,
        norm_eval=True,
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
