# ImageNet-1K: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, 1000 folders each. Another set in this layout takes its place
# by data_root and by num_classes.
dataset_type = "mmsnnet.ImageNet"
data_root = "data/imagenet"
metainfo = dict(name="ImageNet")
# DeiT-III's simple random crop and three-augment; mixing is the model's.
train_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(
        type="mmsnnet.TimmTransform",
        input_size=224,
        is_training=True,
        train_crop_mode="src",
        auto_augment="3a",
        color_jitter=0.3,
        interpolation="bicubic",
    ),
    dict(type="mmsnnet.PackClsInputs"),
]
test_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(type="mmsnnet.TimmTransform", input_size=224, crop_pct=1.0, interpolation="bicubic"),
    dict(type="mmsnnet.PackClsInputs"),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),  # one tensor for a batch, one copy to the GPU
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type=dataset_type, data_root=data_root, split="train", metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type=dataset_type, data_root=data_root, split="val", metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="mmsnnet.Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
