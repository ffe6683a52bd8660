# ADE20K for patches of 14 pixels: everything at 518 = 37 x 14 where ade20k.py has 512.
_base_ = "ade20k.py"
crop_size = (518, 518)
train_pipeline = [
    dict(type="mmsnnet.LoadImage"),
    dict(type="mmsnnet.LoadSegLabels", num_classes=150),
    dict(type="RandomResize", scale=(2072, 518), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),  # by this name mmseg's inferencers find it
    dict(type="Resize", scale=(2072, 518), keep_ratio=True),
    dict(type="mmsnnet.LoadSegLabels", num_classes=150),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
