# A stitched backbone with SETR's naive head and one auxiliary head. Tiny: GPUs want SyncBN, a CPU wants BN.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(64, 64)),
    backbone=dict(
        type='mmsnnet.StitchedViT',
        anchors=[
            dict(model='vit_tiny_patch16_224', patch_size=8, embed_dim=64, depth=6, num_heads=2),
            dict(model='vit_tiny_patch16_224', patch_size=8, embed_dim=128, depth=12, num_heads=4),
        ],
        img_size=64,
        out_indices=dict(train=(7, 11), test=(11, )),
        rank=8),
    decode_head=dict(
        type='SETRUPHead',
        in_channels=128,
        channels=64,
        in_index=1,
        num_classes=8,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        num_convs=1,
        up_scale=4,
        kernel_size=1,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='SETRUPHead',
        in_channels=128,
        channels=64,
        in_index=0,
        num_classes=8,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        num_convs=1,
        up_scale=4,
        kernel_size=1,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
