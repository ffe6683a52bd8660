# SN-Net (arXiv 2302.06586): DeiT tiny, small and base in a sliding window, with layers of full rank. All stitches are
# in one bin, so that each draw takes any of them with the same probability.
_base_ = "stitched-deit3-s-l_classifier.py"
model = dict(
    backbone=dict(
        anchors=[
            dict(model="deit_tiny_patch16_224.fb_in1k", drop_path_rate=0.1, pretrained=True),
            dict(model="deit_small_patch16_224.fb_in1k", drop_path_rate=0.1, pretrained=True),
            dict(model="deit_base_patch16_224.fb_in1k", drop_path_rate=0.1, pretrained=True),
        ],
        scheme="sliding_window",
        rank=0,
        flops_step=100e9,
    ),
    mixing=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    erasing=dict(probability=0.25, mode="pixel"),
)
