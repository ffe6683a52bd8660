_base_ = [
    "../_base_/models/stitched-dinov3-s-l_linear.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_80k_adamw.py",
    "../_base_/default_runtime.py",
]
