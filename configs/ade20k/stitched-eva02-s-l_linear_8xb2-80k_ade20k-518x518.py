_base_ = [
    "../_base_/models/stitched-eva02-s-l_linear.py",
    "../_base_/datasets/ade20k_518x518.py",
    "../_base_/schedules/schedule_80k_adamw.py",
    "../_base_/default_runtime.py",
]
