# A short AdamW schedule for tiny anchors.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=80, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=80, end=800, T_max=720, by_epoch=False),
]
train_cfg = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=800, val_interval=800)
# The anchors alone, to be quick; left out, stitches='spread' validates some between them too.
val_cfg = dict(type="mmsnnet.StitchValLoop", stitches="anchors")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", by_epoch=False, interval=800, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=50),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
