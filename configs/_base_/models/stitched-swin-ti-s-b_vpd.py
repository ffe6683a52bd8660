# Swin tiny, small and base with the depth head of VPD (arXiv 2303.02153), which reads four maps of strides 4 to 32. In
# VPD the strides are 8 to 64: one deconvolution less gives a depth map of the image's size here, too.
model = dict(
    type="mmsnnet.DepthEstimator",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,  # of the depth map: not measured
        size=(416, 544),
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(model="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
            dict(model="swin_small_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
            dict(model="swin_base_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
        ],
        img_size=(416, 544),
        out_indices=(0, 1, 2, 3),  # stages
        norm_taps=True,
        rank=16,
        flops_step=4e9,
    ),
    decode_head=dict(
        type="VPDDepthHead",
        in_channels=[128, 256, 512, 1024],
        embed_dim=96,
        feature_dim=768,  # 8 x embed_dim
        num_deconv_layers=2,
        num_deconv_filters=(32, 32),
        max_depth=10.0,
        loss_decode=dict(type="mmsnnet.SILogLoss", warm_up_iters=100),
    ),
    train_cfg=dict(),
    # The whole image in one crop, and its mirror image: the mean of both.
    test_cfg=dict(mode="slide_flip", crop_size=(480, 640), stride=(480, 640)),
)
