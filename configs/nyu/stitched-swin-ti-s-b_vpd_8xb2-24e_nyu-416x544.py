_base_ = [
    "../_base_/models/stitched-swin-ti-s-b_vpd.py",
    "../_base_/datasets/nyu.py",
    "../_base_/schedules/schedule_nyu_24e.py",
    "../_base_/default_runtime.py",
]
log_processor = dict(by_epoch=True)
