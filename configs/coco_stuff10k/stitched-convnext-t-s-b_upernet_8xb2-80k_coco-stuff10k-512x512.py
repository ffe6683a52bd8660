_base_ = [
    "../_base_/models/stitched-convnext-t-s-b_upernet.py",
    "../_base_/datasets/coco_stuff10k.py",
    "../_base_/schedules/schedule_80k_convnext.py",
    "../_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=171), auxiliary_head=dict(num_classes=171))
