# The large anchor alone.
_base_ = [
    "../_base_/models/mask-rcnn_tiny.py",
    "../_base_/datasets/coco128_256x256.py",
    "../_base_/schedules/schedule_coco128_300.py",
    "../_base_/default_runtime_det.py",
]
log_processor = dict(by_epoch=False)
work_dir = "work_dirs/coco128/anchor_l"
