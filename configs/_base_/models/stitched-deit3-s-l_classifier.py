# Two DeiT-III anchors, each with its own norm and head.
model = dict(
    type="mmsnnet.StitchedClassifier",
    data_preprocessor=dict(
        type="ImgDataPreprocessor",
        mean=[123.675, 116.28, 103.53],  # as in the anchors' pretraining; images are RGB
        std=[58.395, 57.12, 57.375],
        non_blocking=True,
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(model="deit3_small_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.05, pretrained=True),
            dict(model="deit3_large_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.4, pretrained=True),
        ],
        img_size=224,
        rank=64,
        flops_step=1e9,
    ),
    num_classes=1000,
    mixing=dict(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1),
)
