_base_ = [
    "../_base_/models/stitched-deit3-s-l_dpt.py",
    "../_base_/datasets/nyu.py",
    "../_base_/schedules/schedule_nyu_24e.py",
    "../_base_/default_runtime.py",
]
log_processor = dict(by_epoch=True)
