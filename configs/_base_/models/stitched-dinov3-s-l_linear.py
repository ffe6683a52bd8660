# DINOv3 small and large with a linear head. Meta's weights have a licence of their own: docs/anchors.md.
_base_ = "stitched-deit3-s-l_linear.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="vit_small_patch16_dinov3.lvd1689m", pretrained=True, drop_path_rate=0.1),
            dict(model="vit_large_patch16_dinov3.lvd1689m", pretrained=True, drop_path_rate=0.1),
        ],
    ),
)
