# SN-Net's schedule for Swin: stitching layers at ten times the rate of anchors and heads, clipped gradients.
_base_ = "imagenet_bs1024_adamw_50e.py"
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(anchor_lr_mult=0.1, head_lr_mult=0.1),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),  # from 1e-6, anchors 1e-7
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-2, begin=5, end=50, convert_to_iter_based=True),  # to 1e-5, 1e-6
]
