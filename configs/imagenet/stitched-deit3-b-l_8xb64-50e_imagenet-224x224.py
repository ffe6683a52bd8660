# SN-Netv2, DeiT3-B and -L on ImageNet-1K.
_base_ = "stitched-deit3-s-l_8xb64-50e_imagenet-224x224.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="deit3_base_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.15, pretrained=True),
            dict(model="deit3_large_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.4, pretrained=True),
        ]
    )
)
