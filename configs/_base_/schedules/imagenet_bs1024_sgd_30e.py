# SN-Net's schedule for ResNets: 30 epochs of SGD, stitching layers at ten times the rate of anchors and heads.
_base_ = "imagenet_bs1024_adamw_50e.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=2e-5),
    paramwise_cfg=dict(anchor_lr_mult=0.1, head_lr_mult=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, begin=0, end=5, convert_to_iter_based=True),  # from 1e-5, anchors 1e-6
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=5, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
