# SN-Net's schedule for LeViT: 100 epochs, gradients clipped in proportion to the weights.
_base_ = "imagenet_bs1024_adamw_50e.py"
optim_wrapper = dict(optimizer=dict(weight_decay=0.025), clip_grad=dict(type="agc", clip_factor=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),  # from 1e-7
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
