_base_ = "stitched-dinov3-s-l_linear_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        anchors=[
            _base_.model.backbone.anchors[0],
            dict(_base_.model.backbone.anchors[0], model="vit_base_patch16_dinov3.lvd1689m"),
            _base_.model.backbone.anchors[1],
        ],
        flops_step=5e9,
    )
)
