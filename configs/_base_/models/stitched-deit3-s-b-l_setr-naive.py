_base_ = "stitched-deit3-s-l_setr-naive.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="deit3_small_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.1,
                init_values=1.0,
                rel_pos_bias=True,
            ),
            dict(
                model="deit3_base_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.1,
                init_values=1.0,
                rel_pos_bias=True,
            ),
            dict(
                model="deit3_large_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.1,
                init_values=1.0,
                rel_pos_bias=True,
            ),
        ],
        flops_step=5e9,  # below what a block of B costs more than one of S, so that S has a bin of its own
    )
)
