_base_ = [
    "../_base_/models/stitched-resnet18-50_pspnet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]
sync_bn = "torch"  # the anchors have batch norms, too
