# ImageNet-1K in batches of 128, with RandAugment and a test crop of 224 from a shorter side of 256, as in DeiT. SN-Net
# sets colour jitter of 0.4, too, which timm leaves out beside RandAugment.
_base_ = "imagenet.py"
train_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(
        type="mmsnnet.TimmTransform",
        input_size=224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
    ),
    dict(type="mmsnnet.PackClsInputs"),
]
test_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(type="mmsnnet.TimmTransform", input_size=224, crop_pct=0.875, interpolation="bicubic"),
    dict(type="mmsnnet.PackClsInputs"),
]
train_dataloader = dict(batch_size=128, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
