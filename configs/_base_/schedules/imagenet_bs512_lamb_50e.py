# The published schedule: 50 epochs at a batch of 512 (8 GPUs x 64), LAMB, 5 epochs of warm-up, cosine.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="mmsnnet.StitchOptimWrapperConstructor",  # no decay on norms, biases, position embeddings, class tokens
    optimizer=dict(type="mmsnnet.Lamb", lr=3e-5, weight_decay=0.02),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 300, begin=0, end=5, convert_to_iter_based=True),  # from 1e-7
    dict(type="CosineAnnealingLR", eta_min=1e-7, begin=5, end=50, convert_to_iter_based=True),
]
train_cfg = dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=50, val_interval=5)
val_cfg = dict(type="mmsnnet.StitchValLoop")
test_cfg = dict(type="mmsnnet.StitchTestLoop")
auto_scale_lr = dict(base_batch_size=512, enable=False)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", interval=1, max_keep_ckpts=2, save_best="L/top1"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="mmsnnet.StitchInitHook", num_images=100),
    dict(type="mmsnnet.StitchLogHook"),
    dict(type="mmsnnet.ConsistencyHook"),
]
