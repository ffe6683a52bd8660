# SN-Net, Swin-Ti, -S and -B on ImageNet-1K.
_base_ = [
    "../_base_/models/stitched-deit-ti-s-b_classifier.py",
    "../_base_/datasets/imagenet_randaugment.py",
    "../_base_/schedules/imagenet_bs1024_adamw_50e_swin.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
model = dict(
    backbone=dict(
        anchors=[
            dict(model="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", drop_path_rate=0.2, pretrained=True),
            dict(model="swin_small_patch4_window7_224.ms_in22k_ft_in1k", drop_path_rate=0.2, pretrained=True),
            dict(model="swin_base_patch4_window7_224.ms_in22k_ft_in1k", drop_path_rate=0.2, pretrained=True),
        ],
        skip_stages=(3,),
    )
)
