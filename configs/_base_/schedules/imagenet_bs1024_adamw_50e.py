# SN-Net's schedule for DeiT: 50 epochs of AdamW at a batch of 1024 (8 GPUs x 128), 5 epochs of warm-up, cosine.
_base_ = "imagenet_bs512_lamb_50e.py"
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05, fused=True))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),  # from 1e-7
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=50, convert_to_iter_based=True),
]
# Half of the loss is the cross entropy against the classes that a RegNetY-16GF predicts (DeiT's hard distillation).
train_cfg = dict(
    distill=dict(
        task=0.5,
        outputs=0.5,
        hard=True,
        teacher=dict(
            model=dict(
                type="mmsnnet.StitchedClassifier",
                backbone=dict(
                    type="mmsnnet.StitchedViT", anchors=[dict(model="regnety_160.deit_in1k", pretrained=True)]
                ),
                num_classes=1000,
            )
        ),
    )
)
auto_scale_lr = dict(base_batch_size=1024)
