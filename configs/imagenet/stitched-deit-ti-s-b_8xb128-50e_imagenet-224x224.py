# SN-Net, DeiT-Ti, -S and -B on ImageNet-1K.
_base_ = [
    "../_base_/models/stitched-deit-ti-s-b_classifier.py",
    "../_base_/datasets/imagenet_repeated.py",
    "../_base_/schedules/imagenet_bs1024_adamw_50e.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
# As published. Anchors alone have their final norm, so one head is trained for two kinds of input; False norms both.
model = dict(backbone=dict(skip_final_norm=True))
