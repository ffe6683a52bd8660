_base_ = "stitched-eva02-s-l_linear_8xb2-80k_ade20k-518x518.py"
model = dict(
    backbone=dict(
        anchors=[
            _base_.model.backbone.anchors[0],
            dict(_base_.model.backbone.anchors[0], model="eva02_base_patch14_224.mim_in22k"),
            _base_.model.backbone.anchors[1],
        ],
        flops_step=5e9,
    )
)
