# The large anchor alone.
_base_ = [
    "../_base_/models/upernet_tiny.py",
    "../_base_/datasets/shapes.py",
    "../_base_/schedules/schedule_tiny_800.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/quickstart/swin_l"
