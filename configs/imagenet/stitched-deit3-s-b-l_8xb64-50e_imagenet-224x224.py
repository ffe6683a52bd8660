_base_ = "stitched-deit3-s-l_8xb64-50e_imagenet-224x224.py"
model = dict(
    backbone=dict(
        anchors=[
            _base_.model.backbone.anchors[0],
            dict(
                _base_.model.backbone.anchors[0], model="deit3_base_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.15
            ),
            _base_.model.backbone.anchors[1],
        ],
    )
)
