_base_ = [
    "../_base_/models/stitched-dinov2-s-l_linear.py",
    "../_base_/datasets/coco_stuff10k_518x518.py",
    "../_base_/schedules/schedule_80k_adamw.py",
    "../_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=171))
