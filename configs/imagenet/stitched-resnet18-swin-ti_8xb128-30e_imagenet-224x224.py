# SN-Net, ResNet-18 and Swin-Ti on ImageNet-1K.
_base_ = [
    "../_base_/models/stitched-deit-ti-s-b_classifier.py",
    "../_base_/datasets/imagenet_randaugment.py",
    "../_base_/schedules/imagenet_bs1024_sgd_30e.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
model = dict(
    backbone=dict(
        anchors=[
            dict(model="resnet18.tv_in1k", pretrained=True),
            dict(model="swin_tiny_patch4_window7_224.ms_in1k", drop_path_rate=0.1, pretrained=True),
        ],
        skip_stages=(0, 3),
    ),
    mixing=dict(_delete_=True, prob=0.0, label_smoothing=0.1),  # nothing is mixed
    erasing=dict(probability=0.6, num_splits=2),  # of the second half of each batch
)
