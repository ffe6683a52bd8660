# ConvNeXt tiny, small and base (arXiv 2201.03545) under the same heads, as in mmsegmentation's ConvNeXt configs.
_base_ = "stitched-swin-ti-s-b_upernet.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="convnext_tiny.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.4),
            dict(model="convnext_small.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.3),
            dict(model="convnext_base.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.4),
        ],
    ),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
