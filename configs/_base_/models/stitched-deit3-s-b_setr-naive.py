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
        ],
        out_indices=(4, 7, 9, 11),  # at the depths of S-L's taps
    ),
    decode_head=dict(in_channels=768),
    auxiliary_head=[dict(head, in_channels=768) for head in _base_.model.auxiliary_head],
)
