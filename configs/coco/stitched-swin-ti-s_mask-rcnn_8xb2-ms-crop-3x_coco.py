_base_ = [
    "../_base_/models/stitched-swin-ti-s_mask-rcnn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_coco_3x_adamw.py",
    "../_base_/default_runtime_det.py",
]
