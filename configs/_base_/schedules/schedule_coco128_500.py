_base_ = "schedule_tiny_800.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=50, end=500, T_max=450, by_epoch=False),
]
train_cfg = dict(max_iters=500, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500), visualization=dict(type="DetVisualizationHook"))
