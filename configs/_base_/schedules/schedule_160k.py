# The toolbox's SGD schedule, with the loops and hooks of a stitched model.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005),
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=160000, by_epoch=False)]
train_cfg = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="mmsnnet.StitchValLoop")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="mmsnnet.AtomicCheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2, save_best="L/mIoU"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=50),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
