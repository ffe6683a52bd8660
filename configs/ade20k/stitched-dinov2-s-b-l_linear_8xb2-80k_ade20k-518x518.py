_base_ = "stitched-dinov2-s-l_linear_8xb2-80k_ade20k-518x518.py"
model = dict(
    backbone=dict(
        anchors=[
            _base_.model.backbone.anchors[0],
            dict(_base_.model.backbone.anchors[0], model="vit_base_patch14_dinov2.lvd142m"),
            _base_.model.backbone.anchors[1],
        ],
        flops_step=5e9,
    )
)
