# A stitched segmentor small enough for a repository: windows, a relative position bias, class tokens.
default_scope = "mmseg"
custom_imports = dict(imports=["mmsnnet"], allow_failed_imports=False)
classes = ["background", "disc", "square", "triangle", "ring", "cross", "star", "bar"]
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root="data",
    metainfo=dict(classes=classes, palette=[[k, k, k] for k in range(8)]),
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    pipeline=pipeline,
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size_divisor=8,
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(
                model="deit3_small_patch16_224",
                patch_size=8,
                embed_dim=16,
                depth=3,
                num_heads=2,
                mlp_ratio=2,
                window_size=3,
                rel_pos_bias=True,
            ),
            dict(
                model="deit3_small_patch16_224",
                patch_size=8,
                embed_dim=24,
                depth=6,
                num_heads=2,
                mlp_ratio=2,
                window_size=4,
                global_blocks=[1, 5],
                rel_pos_bias=True,
            ),
        ],
        img_size=64,
        rank=2,
        out_indices=(2, 5),
        flops_step=5e5,
    ),
    decode_head=dict(
        type="SETRUPHead",
        in_index=1,
        in_channels=24,
        channels=16,
        num_classes=8,
        num_convs=1,
        up_scale=4,
        kernel_size=3,
        norm_cfg=dict(type="BN"),
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(64, 64), stride=(40, 40)),
)
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler"), dataset=dataset)
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dataset)
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU", "mFscore"])
test_cfg = dict(type="mmsnnet.StitchTestLoop")
train_cfg = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=1500)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-3))
custom_hooks = [dict(type="mmsnnet.StitchInitHook", num_images=4)]
default_hooks = dict(
    checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", interval=1500, save_optimizer=False, by_epoch=False),
    logger=dict(type="LoggerHook", interval=10),
)
randomness = dict(seed=0)
