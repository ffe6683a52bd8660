_base_ = "stitched-deit3-s-l_mask-rcnn_8xb8-100e_coco-1024x1024.py"
model = dict(
    backbone=dict(
        anchors=[
            _base_.model.backbone.anchors[0],
            dict(_base_.model.backbone.anchors[0], model="deit3_base_patch16_224.fb_in22k_ft_in1k"),
            _base_.model.backbone.anchors[1],
        ],
        flops_step=20e9,
    )
)
