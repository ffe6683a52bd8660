# COCO 2017 as in coco_instance_ms-crop.py, boxes alone.
_base_ = "coco_instance_ms-crop.py"
train_pipeline = [
    dict(step, with_mask=False) if step["type"] == "LoadAnnotations" else step for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator
