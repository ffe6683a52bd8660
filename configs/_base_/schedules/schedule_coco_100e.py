# ViTDet's schedule: 100 epochs in batches of 64, the learning rate cut to a tenth at 89 % and 96 % of them.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, fused=True),
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
auto_scale_lr = dict(base_batch_size=64, enable=False)  # enable it to train in batches of another size
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=100, milestones=[89, 96], gamma=0.1),
]
train_cfg = dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=100, val_interval=10)
val_cfg = dict(type="mmsnnet.StitchValLoop")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="mmsnnet.AtomicCheckpointHook", interval=1, max_keep_ckpts=2, save_best="L/coco/bbox_mAP", rule="greater"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=50),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
