# One cycle over 24 epochs: 0.3 of them up from a 25th of the highest rate, then down to a 100th of where it began.
# mmengine's OneCycleLR would give all groups of parameters one highest rate; two cosines keep the anchors' a tenth.
max_lr = 2e-5
epochs, warm_up_epochs = 24, 7.2
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    paramwise_cfg=dict(anchor_lr_mult=0.1, stitching_lr_mult=0.1, head_lr_mult=1.0),
    optimizer=dict(type="AdamW", lr=max_lr / 25, weight_decay=0.01, fused=True),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min_ratio=25, begin=0, end=warm_up_epochs, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=warm_up_epochs, end=epochs, convert_to_iter_based=True),
]
train_cfg = dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
val_cfg = dict(type="mmsnnet.StitchValLoop")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="mmsnnet.AtomicCheckpointHook",
        by_epoch=True,
        interval=1,
        max_keep_ckpts=2,
        save_best="L/abs_rel",
        rule="less",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=50),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
