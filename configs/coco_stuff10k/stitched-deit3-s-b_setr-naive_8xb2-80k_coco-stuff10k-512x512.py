_base_ = "stitched-deit3-s-l_setr-naive_8xb2-80k_coco-stuff10k-512x512.py"
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
    auxiliary_head=[
        dict(
            type="SETRUPHead",
            in_channels=768,
            in_index=index,
            channels=256,
            num_convs=2,
            up_scale=4,
            kernel_size=1,
            num_classes=171,
            dropout_ratio=0,
            norm_cfg=dict(type="SyncBN", requires_grad=True),
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        )
        for index in (0, 1, 2)
    ],
)
