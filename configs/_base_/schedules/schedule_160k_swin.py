# The toolbox's schedule for Swin: AdamW at one rate, 1,500 iterations of warm-up, then a line to zero.
_base_ = "schedule_160k.py"
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",  # no decay on norms, biases and tables of relative positions
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
