# SN-Netv2 for segmentation as published: DeiT-III small and large, SETR's naive head, three auxiliary heads.
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="mmsnnet.EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[  # init_values is where layer scale starts without pretrained weights, which bring their own
            dict(
                model="deit3_small_patch16_224.fb_in22k_ft_in1k",
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
        img_size=512,
        out_indices=(9, 14, 19, 23),
        rank=16,
        flops_step=10e9,
    ),
    decode_head=dict(
        type="SETRUPHead",
        in_channels=1024,
        in_index=3,
        channels=256,
        num_convs=1,
        up_scale=4,
        kernel_size=1,
        num_classes=150,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=[
        dict(
            type="SETRUPHead",
            in_channels=1024,
            in_index=index,
            channels=256,
            num_convs=2,
            up_scale=4,
            kernel_size=1,
            num_classes=150,
            dropout_ratio=0,
            norm_cfg=norm_cfg,
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        )
        for index in (0, 1, 2)
    ],
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
