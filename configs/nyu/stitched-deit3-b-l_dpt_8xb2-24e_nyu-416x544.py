_base_ = "stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="deit3_base_patch16_224.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
            dict(model="deit3_large_patch16_224.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
        ],
    )
)
