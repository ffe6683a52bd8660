_base_ = [
    "../_base_/models/stitched-swin-ti-s-b_upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k_swin.py",
    "../_base_/default_runtime.py",
]
