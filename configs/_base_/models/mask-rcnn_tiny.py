# Mask R-CNN of a quarter of the usual width around one tiny ViT, an anchor alone; a config that stitches lists two.
_base_ = "stitched-deit3-s-l_mask-rcnn.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=256),
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                embed_dim=128,
                depth=12,
                num_heads=4,
                window_size=8,
                global_blocks=(2, 5, 8, 11),
            )
        ],
        img_size=256,
    ),
    neck=dict(in_channels=128, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=250),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=250)),
)
