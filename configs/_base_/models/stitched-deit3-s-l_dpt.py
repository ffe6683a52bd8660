# SN-Netv2 for depth as published: DeiT-III small and large, DPT's head on four taps and their class tokens.
model = dict(
    type="mmsnnet.DepthEstimator",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,  # of the depth map: not measured
        size=(416, 544),
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(model="deit3_small_patch16_224.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
            dict(model="deit3_large_patch16_224.fb_in22k_ft_in1k", pretrained=True, drop_path_rate=0.1),
        ],
        img_size=(416, 544),
        out_indices=(4, 11, 17, 23),  # the small anchor's blocks 2, 5, 8, 11
        rank=16,
        flops_step=10e9,
    ),
    decode_head=dict(
        type="mmsnnet.DPTDepthHead",
        in_channels=1024,
        channels=256,
        post_process_channels=(96, 192, 384, 768),
        readout_type="project",
        min_depth=1e-3,
        max_depth=10.0,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        loss_decode=dict(type="mmsnnet.SILogLoss", warm_up_iters=100),
    ),
    train_cfg=dict(),
    # The whole image in one crop, and its mirror image: the mean of both.
    test_cfg=dict(mode="slide_flip", crop_size=(480, 640), stride=(480, 640)),
)
