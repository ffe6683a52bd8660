# SN-Net, ResNet-18 and -50 on ImageNet-1K.
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
            dict(model="resnet50.a1_in1k", pretrained=True),
        ],
        skip_stages=(0, 3),
    ),
    mixing=dict(_delete_=True, prob=0.0, label_smoothing=0.1),  # nothing is mixed
    erasing=dict(probability=0.6, num_splits=2),  # of the second half of each batch
)
