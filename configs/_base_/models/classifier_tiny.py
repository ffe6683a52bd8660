# One tiny ViT for images of 32 x 32, an anchor alone; a config that stitches lists two.
model = dict(
    type="mmsnnet.StitchedClassifier",
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[dict(model="vit_tiny_patch16_224", patch_size=4, embed_dim=96, depth=12, num_heads=3)],
        img_size=32,
    ),
    num_classes=10,
    mixing=dict(prob=0.0, label_smoothing=0.1),  # nothing is mixed in runs this short
)
