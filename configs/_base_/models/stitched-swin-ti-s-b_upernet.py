# Swin tiny, small and base (arXiv 2103.14030) with UPerNet on their four stages, as in mmsegmentation's Swin configs.
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
        anchors=[
            dict(model="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.3),
            dict(model="swin_small_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.3),
            dict(model="swin_base_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.3),
        ],
        img_size=512,
        out_indices=(0, 1, 2, 3),  # stages
        norm_taps=True,
        rank=16,
        flops_step=4e9,
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[128, 256, 512, 1024],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=512,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
