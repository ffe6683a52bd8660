# One tiny Swin, an anchor alone, with UPerNet on its four stages; a config that stitches lists two.
# BN trains on a CPU; on several GPUs it is to be SyncBN.
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="mmsnnet.EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(64, 64),
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                window_size=4,
                embed_dim=48,
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 8, 16),
            )
        ],
        img_size=64,
        out_indices=(0, 1, 2, 3),  # stages
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[48, 96, 192, 384],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2),
        channels=32,
        num_classes=8,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=192,
        in_index=2,
        channels=32,
        num_convs=1,
        concat_input=False,
        num_classes=8,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
