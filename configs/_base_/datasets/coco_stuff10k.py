# COCO-Stuff 10k: 171 classes (things and stuff), 9000 + 1000 images, read as ADE20K is. In the label maps that
# mmsegmentation's converter writes (*_labelTrainIds.png), 0 is for what has no label; reduce_zero_label makes that 255
# and the classes 0 to 170.
_base_ = "ade20k.py"
dataset_type = "COCOStuffDataset"
data_root = "data/coco_stuff10k"
train_pipeline = [dict(step, num_classes=171) if "num_classes" in step else step for step in _base_.train_pipeline]
test_pipeline = [dict(step, num_classes=171) if "num_classes" in step else step for step in _base_.test_pipeline]
train_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/train2014", seg_map_path="annotations/train2014"),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/test2014", seg_map_path="annotations/test2014"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
