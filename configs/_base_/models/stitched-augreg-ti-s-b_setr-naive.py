# AugReg's ViTs (arXiv 2106.10270) have no layer scale, and images between -1 and 1.
_base_ = "stitched-deit3-s-b_setr-naive.py"
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        anchors=[
            dict(model="vit_tiny_patch16_224.augreg_in21k", pretrained=True, drop_path_rate=0.1, rel_pos_bias=True),
            dict(model="vit_small_patch16_224.augreg_in21k", pretrained=True, drop_path_rate=0.1, rel_pos_bias=True),
            dict(model="vit_base_patch16_224.augreg_in21k", pretrained=True, drop_path_rate=0.1, rel_pos_bias=True),
        ],
        flops_step=1.5e9,  # below what a block of S costs more than one of Ti, so that Ti has a bin of its own
    ),
)
