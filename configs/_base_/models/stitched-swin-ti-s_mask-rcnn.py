# Swin tiny and small (arXiv 2103.14030) with FPN and Mask R-CNN, as in mmdetection's Swin configs.
_base_ = "stitched-deit3-s-l_mask-rcnn.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(model="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.2),
            dict(model="swin_small_patch4_window7_224.ms_in22k_ft_in1k", pretrained=True, drop_path_rate=0.2),
        ],
        img_size=(800, 1344),
        out_indices=(0, 1, 2, 3),  # stages
        norm_taps=True,
        rank=16,
        flops_step=10e9,
    ),
    neck=dict(_delete_=True, type="FPN", in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=1),
    roi_head=dict(
        bbox_head=dict(
            _delete_=True,
            type="Shared2FCBBoxHead",
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        mask_head=dict(norm_cfg=None),
    ),
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=True))),
)
