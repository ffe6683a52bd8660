# DINOv2 small and large with a linear head: patches of 14, hence 518 = 37 x 14.
_base_ = "stitched-deit3-s-l_linear.py"
model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(
        anchors=[
            dict(model="vit_small_patch14_dinov2.lvd142m", pretrained=True, drop_path_rate=0.1),
            dict(model="vit_large_patch14_dinov2.lvd142m", pretrained=True, drop_path_rate=0.1),
        ],
        img_size=518,
    ),
    test_cfg=dict(crop_size=(518, 518), stride=(345, 345)),
)
