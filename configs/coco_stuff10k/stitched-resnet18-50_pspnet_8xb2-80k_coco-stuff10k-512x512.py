_base_ = [
    "../_base_/models/stitched-resnet18-50_pspnet.py",
    "../_base_/datasets/coco_stuff10k.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(decode_head=dict(num_classes=171), auxiliary_head=dict(num_classes=171))
sync_bn = "torch"  # the anchors have batch norms, too
