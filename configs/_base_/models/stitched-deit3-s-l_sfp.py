# The part that every detector here shares: DeiT-III small and large as ViTDet runs a plain ViT (arXiv 2203.16527), in
# windows of 16 x 16 patches but for one block in each quarter of the depth, and the simple feature pyramid.
model = dict(
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1024,  # to the square that the position embeddings are for, with the mean colour
    ),
    backbone=dict(
        type="mmsnnet.StitchedViT",
        anchors=[
            dict(
                model="deit3_small_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.1,
                window_size=16,
                global_blocks=(2, 5, 8, 11),
            ),
            dict(
                model="deit3_large_patch16_224.fb_in22k_ft_in1k",
                pretrained=True,
                drop_path_rate=0.4,
                window_size=16,
                global_blocks=(5, 11, 17, 23),
            ),
        ],
        img_size=1024,
        rank=16,
        flops_step=40e9,  # four times as wide as at 512 x 512, as there are four times as many patches
    ),
    neck=dict(type="mmsnnet.SimpleFeaturePyramid", in_channels=1024, out_channels=256, num_outs=5),
)
