_base_ = [
    "../_base_/models/stitched-deit3-s-l_rtmdet.py",
    "../_base_/datasets/coco_detection_1024x1024.py",
    "../_base_/schedules/schedule_coco_100e.py",
    "../_base_/default_runtime_det.py",
]
