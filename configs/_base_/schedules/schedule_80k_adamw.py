# AdamW, a rate for each part: anchors 2e-5 and less towards the stem, stitching layers 1e-4, heads 1e-3.
_base_ = "schedule_80k.py"
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(anchor_lr_mult=0.2, layer_decay_rate=0.9, head_lr_mult=10.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False),
]
