# Four epochs of AdamW for tiny anchors.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=0.5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=0.5, end=4, convert_to_iter_based=True),
]
train_cfg = dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=4, val_interval=1)
val_cfg = dict(type="mmsnnet.StitchValLoop", stitches="anchors")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=100),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
