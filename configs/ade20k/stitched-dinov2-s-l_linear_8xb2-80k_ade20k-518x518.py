# DINOv2 with a linear head: patches of 14, hence 518 = 37 x 14. AdamW with rates for each part of the model.
_base_ = [
    "../_base_/models/stitched-deit3-s-l_setr-naive.py",
    "../_base_/datasets/ade20k_518x518.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(
        anchors=[
            dict(model="vit_small_patch14_dinov2.lvd142m", pretrained=True, drop_path_rate=0.1),
            dict(model="vit_large_patch14_dinov2.lvd142m", pretrained=True, drop_path_rate=0.1),
        ],
        img_size=518,
        out_indices=(23,),
    ),
    decode_head=dict(
        _delete_=True,
        type="mmsnnet.LinearHead",
        in_channels=1024,
        in_index=0,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=None,
    test_cfg=dict(crop_size=(518, 518), stride=(345, 345)),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(anchor_lr_mult=0.2, layer_decay_rate=0.9, head_lr_mult=10.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False),
]
