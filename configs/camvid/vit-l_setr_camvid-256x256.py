# The large anchor alone.
_base_ = [
    "../_base_/models/stitched_setr_tiny.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/schedule_tiny.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/camvid/anchor_l"
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(anchors=[dict(model="vit_tiny_patch16_224", embed_dim=192, depth=12, num_heads=6)], img_size=256),
    decode_head=dict(in_channels=192, channels=128, num_classes=11),
    auxiliary_head=dict(in_channels=192, channels=128, num_classes=11),
    test_cfg=dict(mode="slide", crop_size=(256, 256), stride=(224, 224)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=100, end=1000, T_max=900, by_epoch=False),
]
train_cfg = dict(max_iters=1000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
