_base_ = "schedule_tiny_800.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=30, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=30, end=300, T_max=270, by_epoch=False),
]
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=300), visualization=dict(type="DetVisualizationHook"))
