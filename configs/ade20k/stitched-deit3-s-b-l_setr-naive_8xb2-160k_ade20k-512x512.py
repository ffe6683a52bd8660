_base_ = [
    "../_base_/models/stitched-deit3-s-b-l_setr-naive.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]
