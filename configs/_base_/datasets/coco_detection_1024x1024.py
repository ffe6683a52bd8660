# COCO 2017 as in coco_instance_1024x1024.py, boxes alone.
_base_ = "coco_instance_1024x1024.py"
train_pipeline = [
    dict(type="mmsnnet.LoadImage"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale={{_base_.image_size}}, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size={{_base_.image_size}}, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator
