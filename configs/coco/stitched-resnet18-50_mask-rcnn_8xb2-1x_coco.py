_base_ = [
    "../_base_/models/stitched-resnet18-50_mask-rcnn.py",
    "../_base_/datasets/coco_instance_1333x800.py",
    "../_base_/schedules/schedule_coco_1x.py",
    "../_base_/default_runtime_det.py",
]
