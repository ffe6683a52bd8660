# SN-Net, LeViT-192 and -256 on ImageNet-1K.
_base_ = [
    "../_base_/models/stitched-deit-ti-s-b_classifier.py",
    "../_base_/datasets/imagenet_repeated.py",
    "../_base_/schedules/imagenet_bs1024_adamw_100e.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
model = dict(
    backbone=dict(
        anchors=[
            dict(model="levit_192.fb_dist_in1k", pretrained=True),
            dict(model="levit_256.fb_dist_in1k", pretrained=True),
        ],
        skip_stages=(2,),
    )
)
