_base_ = "schedule_tiny_800.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=100, end=1000, T_max=900, by_epoch=False),
]
train_cfg = dict(max_iters=1000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
