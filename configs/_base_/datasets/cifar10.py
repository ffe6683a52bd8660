# CIFAR-10 in ImageNet's layout: train/<class>/* and val/<class>/*, 10 folders each, 32 x 32, as PNG or JPEG files.
dataset_type = "mmsnnet.ImageNet"
data_root = "data/cifar10"
metainfo = dict(name="CIFAR-10")
train_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(type="mmsnnet.TimmTransform", input_size=32, is_training=True, train_crop_mode="src", color_jitter=None),
    dict(type="mmsnnet.PackClsInputs"),
]
test_pipeline = [
    dict(type="mmsnnet.LoadPillowImage"),
    dict(type="mmsnnet.TimmTransform", input_size=32, crop_pct=1.0),
    dict(type="mmsnnet.PackClsInputs"),
]
train_dataloader = dict(
    batch_size=50,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type=dataset_type, data_root=data_root, split="train", metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type=dataset_type, data_root=data_root, split="val", metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="mmsnnet.Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
