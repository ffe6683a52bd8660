# SN-Netv2, DeiT3-S and -L on ImageNet-1K, as published.
_base_ = [
    "../_base_/models/stitched-deit3-s-l_classifier.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/imagenet_bs512_lamb_50e.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
